from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests of the Hub undo this for the processes they start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers, and the processes they start, share the machine
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a hundred processes that tests start would compile lmoe each
if not any(Path("/dev").glob("nvidia[0-9]*")):
    # Read when Triton is first imported, by whomever; its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
# A suite in the background of a shell, or under nohup, ignores these, and so would the programs that tests interrupt.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile("lmoe", deadline=None)  # how long an example takes is a matter of the machine
settings.load_profile("lmoe")

HOMES = itertools.count()
CORPUS = Path(__file__).parents[2] / "shared" / "corpus"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every",
        action="store_true",
        help="ask each law of each kind of adapter on each architecture and each path, not of those that differ alone",
    )


def pytest_collection_finish() -> None:
    _freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Take what is there, such as imported modules, out of every later search for garbage, which takes half a second
    else; torch's compiler and Trainer ask for one each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Real adapters, configs and small trained models, laid beside the checkout."""
    if not CORPUS.is_dir():
        pytest.skip("no corpus of real files beside the checkout (../shared/corpus)")
    return CORPUS


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """One thread per worker: several workers share the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _folders_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and histories of a test stay out of the user's folders."""
    home = tmp_path_factory.getbasetemp() / "homes" / str(next(HOMES))  # made by what writes there first, if anything
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home / name.lower()))
