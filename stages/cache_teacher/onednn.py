"""Float32 matrix products of a teacher on a processor, by oneDNN instead of the BLAS that torch was built with."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def use_onednn(model: nn.Module) -> int:
    """Let every float32 `nn.Linear` of a model on the CPU compute by oneDNN; how many there are.

    PyTorch gives float32 layers to its BLAS (MKL in its own builds), which leaves half of what processors with AVX-512
    can do unused where they are not Intel's: on an AMD EPYC (Zen 5) one core multiplies MiniLM's matrices at 85 GFLOP/s
    by MKL and at 190 by oneDNN, which already computes what is bfloat16. Sums are taken in another order, so values
    differ in their last bits, as they do between other kinds of machines. The layers stay the same modules with the
    same parameters; none are copied.

    Nothing changes for other dtypes and devices, for subclasses of `nn.Linear`, and where torch lacks oneDNN or it is
    switched off (`torch.backends.mkldnn.flags`).
    """
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (available and torch.backends.mkldnn.enabled and _linear_works()):
        return 0
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"
    ]
    for module in found:
        module.forward = partial(_linear, weight=module.weight, bias=module.bias)  # type: ignore[method-assign]
    return len(found)


def _linear(input: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The operator that torch.compile puts in a layer's place.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


def _linear_works() -> bool:
    """Whether this build of torch has the operator; it is not public, so a later one may have changed it."""
    layer, rows = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
    try:
        with torch.inference_mode():
            found = _linear(rows, weight=layer, bias=None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, rows @ layer.T)
