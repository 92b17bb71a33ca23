from __future__ import annotations

import pytest
import torch

from skinsynth.errors import UserError
from skinsynth.models import attention


def test_the_cpu_takes_sdpa_and_says_why_xformers_cannot_be_had() -> None:
    cpu = torch.device("cpu")
    assert attention.choose("auto", cpu) == "sdpa"
    assert attention.choose("sdpa", cpu) == "sdpa"
    with pytest.raises(UserError, match=r"needs a CUDA device; take model\.attention=auto"):
        attention.choose("xformers", cpu)


def test_where_xformers_does_not_work_auto_says_so_and_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    """As on a node whose xformers is not there or does not fit: a GPU is asked for that this machine has not."""
    assert attention.choose("auto", torch.device("cuda")) == "sdpa"
    assert "attention: xformers does not work here (" in caplog.text
    assert "taking sdpa" in caplog.text


@pytest.mark.parametrize("width", [40, 160])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_self_test_tells_a_kernel_that_is_right_from_one_that_is_not(dtype: torch.dtype, width: int) -> None:
    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = (query @ key.transpose(-1, -2)).float() / width**0.5
        return torch.softmax(scores, -1).to(value.dtype) @ value

    torch.manual_seed(0)
    values = torch.randn(3, 8, 64, width, dtype=dtype)
    assert attention._agree(plain, values)
    assert not attention._agree(lambda query, key, value: plain(query, key, value) * 1.1, values)
    assert not attention._agree(lambda query, key, value: plain(query, key, value.detach()), values), "a gradient that is not there"
