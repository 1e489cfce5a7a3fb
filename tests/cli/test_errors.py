"""The messages that users read when a command fails."""

import pytest
from torch.utils.data import DataLoader, Dataset

from lit_transdiff.base.remote_errors import RemoteError
from lit_transdiff.cli.errors import ending_of
from lit_transdiff.data.dataset import loader_options


class Failing(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> object:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code"), [(RemoteError("s3://b/a.tar: failed: reset"), 1), (ValueError("a.tar/x: damaged"), 2)]
)
def test_an_error_in_a_data_worker_is_one_line(error: Exception, code: int) -> None:
    with pytest.raises(type(error)) as caught:
        next(iter(DataLoader(Failing(error), **loader_options(1))))
    assert ending_of(caught.value) == (code, str(error))
