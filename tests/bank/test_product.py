"""The kernels that are chosen by measurement compute the same products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmoe_cli.bank import product
from lmoe_cli.bank.product import Products, choose_products, native, onednn


def matrices(d_out, d_in, count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, d_in), (d_out, d_in), (d_out,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize(("d_out", "d_in"), [(640, 512), (515, 1023), (2048, 128)])
@pytest.mark.parametrize(
    ("kernel", "dtype", "error"),
    [(onednn, torch.float32, 4e-6), (native, torch.bfloat16, 2**-8), (native, torch.float16, 2**-11)],
)
def test_a_kernel_rounds_the_exact_product_as_closely_as_its_dtype_allows(kernel, dtype, error, d_out, d_in, count):
    x, weight, bias = matrices(d_out, d_in, count, dtype)
    exact = x.double() @ weight.double().T + bias.double()
    with torch.inference_mode():
        found = kernel(x, weight, bias)
    assert found.dtype == dtype
    worst = (found.double() - exact).abs().max() / exact.abs().max()
    assert worst <= error


def test_the_other_kernel_is_used_and_not_only_named(monkeypatch):
    seen, linear = [], product.F.linear
    with monkeypatch.context() as patched:
        patched.setattr(product.F, "linear", lambda *a: (seen.append(torch._C._get_mkldnn_enabled()), linear(*a))[1])
        native(*matrices(2048, 1024, 1, torch.bfloat16)[:2], None)
    assert seen == [False]
    x, weight, _ = matrices(2048, 1024, 1, torch.float32)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        onednn(x, weight, None)
    assert any("mkldnn" in event.key for event in profile.key_averages())
    assert torch._C._get_mkldnn_enabled()


def test_the_switch_is_back_also_where_a_product_fails():
    with pytest.raises(RuntimeError):
        native(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16), None)
    assert torch._C._get_mkldnn_enabled()


def test_gradients_pass_where_they_are_asked_for():
    x, weight, bias = matrices(640, 512, 3, torch.float32)
    x.requires_grad_()
    onednn(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


class Clock:
    """Time passes only in the slow kernel, so that nothing else on the machine can decide."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def slow(self, kernel):
        def slowed(x, weight, bias):
            self.now += 0.002
            return kernel(x, weight, bias)

        return slowed


@pytest.mark.parametrize("chosen", ["onednn", "linear"])
@pytest.mark.parametrize("is_stand_in", [True, False])
def test_the_faster_kernel_is_chosen(monkeypatch, chosen, is_stand_in):
    weight = torch.zeros(1).expand(1024, 512) if is_stand_in else torch.zeros(1024, 512)
    weights = [weight for _ in range(8)]
    clock = Clock()
    monkeypatch.setattr(product, "LARGE_BYTES", 1 << 20)
    monkeypatch.setattr(product, "time", clock)
    if chosen == "onednn":
        monkeypatch.setattr(product.F, "linear", clock.slow(nn.functional.linear))
    else:
        monkeypatch.setattr(product, "onednn", clock.slow(onednn))
    found = choose_products(weights)
    assert (found.one is product.F.linear) == (chosen == "linear")
    assert (found.many is product.F.linear) == (chosen == "linear")


def test_small_models_keep_the_kernel_of_torchs_choice():
    assert choose_products([torch.zeros(1024, 1024)]) == Products()
    assert choose_products([]) == Products()


def test_a_layer_that_does_more_than_a_product_does_it_itself():
    quick = Products(one=lambda *_: pytest.fail("its forward was passed over"))

    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(1, 8)
    louder, hooked = Louder(8, 4), nn.Linear(8, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(quick.of(louder, x), louder(x))
    torch.testing.assert_close(quick.of(hooked, x), hooked(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_part_is_added_to_what_the_base_gave(dtype):
    x, b, _ = matrices(640, 16, 1, dtype)
    y = torch.randn(1, 640).to(dtype)
    exact = y.double() + x.double() @ b.double().T
    with torch.inference_mode():
        found = Products(one=native if dtype is torch.bfloat16 else onednn).add(y.clone(), x, b)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-5 if dtype is torch.float32 else 3e-2)


def test_the_switch_of_onednn_is_left_as_it_was_found_and_kernels_are_chosen_while_it_is_off(monkeypatch):
    assert torch._C._get_mkldnn_enabled()
    monkeypatch.setattr(product, "LARGE_BYTES", 0)
    chosen = []
    monkeypatch.setattr(product, "_faster", lambda other, *_: chosen.append(other) or other)
    with product._WITHOUT_ONEDNN, product._WITHOUT_ONEDNN:  # as by two threads
        assert not torch._C._get_mkldnn_enabled()
        choose_products([torch.zeros(1024, 1024)])
    assert chosen == [onednn] * 2
    assert torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with product._WITHOUT_ONEDNN:
            pass
        assert not torch._C._get_mkldnn_enabled()
        assert choose_products([torch.zeros(1024, 1024)]) == Products()
    finally:
        torch._C._set_mkldnn_enabled(True)
