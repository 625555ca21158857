"""How large the largest tensor is that something makes, and how much it makes in all."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Records, meanwhile, the storage of every tensor that any operation returns, of backward passes as well.

    Attributes:
        bytes: of the largest storage.
        shape: of the tensor that it was seen with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.shape = tensor.untyped_storage().nbytes(), tuple(tensor.shape)
        return outputs
