"""What a result says of the machine that made it."""

import pytest
import torch

from common import conditions


@pytest.mark.skipif(torch.cuda.is_available(), reason="a result made on a GPU names the GPU")
@pytest.mark.parametrize(("products", "ending"), [(True, " (AVX2, bf16 products)"), (False, " (AVX2)")])
def test_a_result_names_the_instructions_that_its_times_depend_on(monkeypatch, products, ending):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(conditions, "BF16_PRODUCTS", products)
    assert conditions.conditions("embedded")["device"].endswith(f" CPU{ending}")
