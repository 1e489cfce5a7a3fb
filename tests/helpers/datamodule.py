"""The data module, on its own or read by a module that notes what it is given."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import torch

from lit_transdiff.config import DataConfig
from lit_transdiff.data.datamodule import Batch, DataModule
from tests.helpers.small import FASHION


class Recorder(pl.LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.rows.append(
            (batch.positions.tolist(), batch.samples.tolist(), batch.values.double().sum().item())
        )
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.positions.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def module_for(shards, max_steps=6, accumulation=1, num_references=1, **data):
    settings = dict(train=str(shards), evaluation=str(shards), image_size=8, image_channels=1) | data
    return DataModule(
        DataConfig(**settings),
        num_references=num_references,
        num_classes=5,
        global_batch_size=16,
        micro_batch_size=16 // accumulation,
        max_steps=max_steps,
        seed=1,
        evaluation_batch_size=10,
    )


def fit(module, folder, stop_at, accumulation=1, ckpt_path=None, **options):
    """The batches that training read in ``stop_at`` steps, and the checkpoint of its last step."""
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=stop_at,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        ],
        **({"limit_val_batches": 0} | options),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(recorder, module, ckpt_path=ckpt_path)
    assert not [w for w in caught if "not resumable" in str(w.message)]
    assert trainer.global_step == stop_at
    return recorder


def evaluation_batch(count: int) -> Batch:
    """The first ``count`` of the bundled evaluation images, evenly over the classes, without augmentation."""
    config = DataConfig(evaluation=str(FASHION / "evaluation"), image_size=32, image_channels=1, crop="none")
    data = DataModule(
        config,
        num_references=1,
        num_classes=10,
        global_batch_size=1,
        max_steps=1,
        seed=0,
        evaluation_batch_size=count,
        num_validation_samples=count,
    )
    return next(iter(data.val_dataloader()))
