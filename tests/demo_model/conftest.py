import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def settings_of_torch_are_put_back():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
