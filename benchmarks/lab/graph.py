"""An update of pre-training that can be a CUDA graph: the host starts one operation instead of thousands."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mae.training.optimizers import param_groups_weight_decay
from mae.training.precision import Precision
from models_mae import MaskedAutoencoderViT

WARM_UPS = 3  # updates before the capture, in which libraries allocate their memory and kernels are compiled


class Update:
    """An update with inputs that stay in place, as `mae.training.loop` computes it for one iteration.

    A call copies the inputs into buffers. The learning rate is a tensor, and the optimizer counts its steps on the
    device. Nothing waits for the device, so that the update can be captured.

    Args:
        images: a batch (B, c, H, W), of which shape and dtype count.
        noise: (B, N), of which the shape counts.
        betas: of AdamW.

    Attributes:
        terms: the terms of the loss () by name. The next call overwrites them.
    """

    def __init__(
        self, model: MaskedAutoencoderViT, precision: Precision, images: Tensor, noise: Tensor,
        betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.05,
    ) -> None:  # fmt: skip
        device = precision.device
        self.model = model.train()
        self.precision = precision
        self.images = torch.empty_like(images, device=device)
        self.noise = torch.empty_like(noise, device=device)
        self.lr = torch.zeros((), device=device)
        groups = param_groups_weight_decay(model, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True, capturable=device.type == "cuda")
        for group in self.optimizer.param_groups:  # the constructor would read a tensor
            group["lr"] = self.lr
        self.terms: Mapping[str, Tensor] = {}
        self.run: Callable[[], Any] = self.compute

    def __call__(self, images: Tensor, noise: Tensor, lr: float) -> Mapping[str, Tensor]:
        """Trains on a batch, and returns the terms of its loss. The host may change its batch once the copy is over."""
        self.images.copy_(images, non_blocking=True)
        self.noise.copy_(noise, non_blocking=True)
        self.lr.fill_(lr)
        self.run()
        return self.terms

    def compute(self) -> None:
        """Trains on the batch in the buffers."""
        with self.precision.autocast():
            result: Any = self.model(self.images, noise=self.noise)[0]
        terms = result if isinstance(result, Mapping) else {"loss": result}
        self.precision.backward(torch.stack([*terms.values()]).sum())
        self.precision.step(self.optimizer, None)
        self.terms = {name: term.detach() for name, term in terms.items()}

    def warm_up(self) -> None:
        """Computes updates that leave the weights and the state of the optimizer as they were."""
        parameters = [*self.model.parameters()]
        weights = [parameter.detach().clone() for parameter in parameters]
        state = {p: {name: value.clone() for name, value in of_p.items()} for p, of_p in self.optimizer.state.items()}
        for _ in range(WARM_UPS):
            self.compute()
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
            for key, values in self.optimizer.state.items():
                for name, value in values.items():
                    if key in state:
                        value.copy_(state[key][name])
                    else:
                        value.zero_()

    def capture(self) -> None:
        """Captures the update as a CUDA graph, which later calls replay. Weights and state do not change.

        A graph has the addresses of weights, state and buffers: after another state has been loaded, capture again.
        """
        self.run = captured(self.compute, self.warm_up)


def captured(compute: Callable[[], Any], warm_up: Callable[[], Any]) -> Callable[[], None]:
    """Returns the replay of a CUDA graph.

    Args:
        compute: starts operations that nothing waits for.
        warm_up: is called first, on a stream of its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as one that pins memory, may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay
