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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_takes_a_kernel_that_passed_its_self_test() -> None:
    cuda = torch.device("cuda")
    assert attention.choose("auto", cuda) == ("xformers" if attention.xformers_problem(cuda) is None else "sdpa")
