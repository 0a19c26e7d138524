"""What the MoE layer of NLLB-54B costs on a GPU at best: bytes, FLOPs and time of each step, on paper.

A step takes at least its FLOPs over the peak rate, and its bytes over the memory bandwidth; the larger of both binds.
Each array is read or written once a step, from or to memory: what a cache keeps between steps is not counted, nor are
launches (a few microseconds each). Tokens spread evenly over the experts.

    python benchmarks/roofline.py
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates of a GPU, as its maker states them."""

    name: str
    flops_per_second: float
    """Dense bf16 with fp32 accumulation."""
    bytes_per_second: float


@dataclass(frozen=True)
class Layer:
    """Sizes of a MoE layer; activations and weights in bf16, gate and weight gradients in fp32."""

    d_model: int
    d_ffn: int
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Step:
    """One step of the layer and what it moves and computes at least."""

    name: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """Time at the limit that binds."""
        return max(self.flops / device.flops_per_second, self.bytes / device.bytes_per_second)

    def binds(self, device: Device) -> str:
        """Name of that limit."""
        compute, memory = self.flops / device.flops_per_second, self.bytes / device.bytes_per_second
        return "compute" if compute > memory else "memory"


DEVICES = (Device("A100-80", 312e12, 2.04e12), Device("H100-SXM", 989e12, 3.35e12))
NLLB = Layer(d_model=2048, d_ffn=8192, num_experts=128, top_k=2)
TOKENS = (512, 4096, 16384)
"""Tokens a GPU, all of them routed to experts on it: the exchange between GPUs is another resource."""

HALF, SINGLE, LONG = 2, 4, 8
"""Bytes of a bf16, an fp32 and an int64 value."""


def forward_steps(layer: Layer, tokens: int) -> list[Step]:
    """Gate, dispatch, the two products of the experts, combine."""
    d_model, d_ffn, num_experts, routed = layer.d_model, layer.d_ffn, layer.num_experts, tokens * layer.top_k
    active = min(num_experts, routed)  # experts that have a token, so that their weights are read
    weights = active * d_model * d_ffn * HALF
    product = 2 * routed * d_model * d_ffn
    choices = routed * (LONG + SINGLE)  # expert_index, weight
    gate = tokens * d_model * HALF + num_experts * d_model * SINGLE + 2 * tokens * num_experts * SINGLE + choices
    return [
        Step("gate", 2 * tokens * d_model * num_experts, gate),
        Step("dispatch", 0, (tokens + routed) * d_model * HALF + choices),
        Step("GEMM 1", product, weights + routed * (d_model + d_ffn) * HALF),
        Step("GEMM 2", product, weights + routed * (d_ffn + d_model) * HALF),
        Step("combine", 2 * routed * d_model, (routed + tokens) * d_model * HALF + choices),
    ]


def backward_steps(layer: Layer, tokens: int) -> list[Step]:
    """The same from the end; each product has two, for its input and for its weights."""
    d_model, d_ffn, num_experts, routed = layer.d_model, layer.d_ffn, layer.num_experts, tokens * layer.top_k
    active = min(num_experts, routed)
    matrix = active * d_model * d_ffn
    product = 2 * routed * d_model * d_ffn
    narrow, wide = routed * d_model * HALF, routed * d_ffn * HALF
    choices = routed * (LONG + SINGLE)
    gate = (
        2 * tokens * num_experts * SINGLE  # probabilities, gradient of the logits
        + 2 * tokens * d_model * HALF  # input, its gradient
        + 2 * num_experts * d_model * SINGLE  # weights, their gradient
    )
    return [
        # Reads the gradient and the experts' outputs (for the gradient of the weights), writes that of the outputs.
        Step("combine backward", 4 * routed * d_model, tokens * d_model * HALF + 2 * narrow + choices),
        # The activation's derivative is fused: the hidden values are read, and their gradient is written.
        Step("GEMM 2 backward, input", product, matrix * HALF + narrow + 2 * wide),
        Step("GEMM 2 backward, weight", product, matrix * SINGLE + narrow + wide),
        Step("GEMM 1 backward, input", product, matrix * HALF + wide + narrow),
        Step("GEMM 1 backward, weight", product, matrix * SINGLE + wide + narrow),
        Step("dispatch backward", routed * d_model, narrow + tokens * d_model * HALF + routed * LONG),
        Step("gate backward", 4 * tokens * d_model * num_experts, gate),
    ]


def table(layer: Layer, tokens: int, devices: tuple[Device, ...]) -> str:
    """Markdown: one row a step, a sum for each direction, time and limit on each device."""
    rows = [f"| {tokens} tokens | GFLOP | MB | " + " | ".join(f"{each.name}, µs | bound by" for each in devices) + " |"]
    rows.append("|---|--:|--:|" + "--:|---|" * len(devices))
    everything: list[Step] = []
    for name, steps in (("forward", forward_steps(layer, tokens)), ("backward", backward_steps(layer, tokens))):
        rows += [row(step, [step.seconds(each) for each in devices], devices) for step in steps]
        rows.append(total_row(name, steps, devices))
        everything += steps
    rows.append(total_row("both", everything, devices))
    return "\n".join(rows)


def row(step: Step, seconds: list[float], devices: tuple[Device, ...]) -> str:
    """One line of the table."""
    times = " | ".join(f"{1e6 * time:.1f} | {step.binds(each)}" for time, each in zip(seconds, devices, strict=True))
    return f"| {step.name} | {step.flops / 1e9:.2f} | {step.bytes / 1e6:.1f} | {times} |"


def total_row(name: str, steps: list[Step], devices: tuple[Device, ...]) -> str:
    """Sums over steps; a direction is bound by what binds most of its time."""
    cells = []
    for device in devices:
        total = sum(step.seconds(device) for step in steps)
        memory = sum(step.seconds(device) for step in steps if step.binds(device) == "memory")
        cells.append(f"**{1e6 * total:.1f}** | {100 * memory / total:.0f} % memory")
    flops, moved = sum(step.flops for step in steps), sum(step.bytes for step in steps)
    return f"| **{name}** | **{flops / 1e9:.2f}** | **{moved / 1e6:.1f}** | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the limits and the tables."""
    print("| | bf16 TFLOP/s | TB/s | FLOP a byte at the ridge |\n|---|--:|--:|--:|")
    for device in DEVICES:
        ridge = device.flops_per_second / device.bytes_per_second
        rates = f"{device.flops_per_second / 1e12:.0f} | {device.bytes_per_second / 1e12}"
        print(f"| {device.name} | {rates} | {ridge:.0f} |")
    for tokens in TOKENS:
        print(f"\n{table(NLLB, tokens, DEVICES)}")


if __name__ == "__main__":
    main()
