"""A W&B server in memory, for tests: runs, files, artifacts, the public API, sweeps and agents of the wandb
0.31 client.

GraphQL is not parsed: the client sends fixed documents, so an answer is chosen by the operation's name and
holds more fields than were asked for. Operations that have no answer are kept in ``state.unknown`` and
refused, so that an update of the client fails loudly.
"""

from tests.helpers.wandb_stub.server import Stub

__all__ = ["Stub"]
