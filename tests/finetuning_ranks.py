"""What each rank of test_finetuning.py runs under torchrun: LoRA under layouts and on one rank."""

import torch
import torch.distributed as dist

from fastgpt import GPT, GPTConfig, lora
from fastgpt.lora import LoraConfig
from fastgpt.parallel import Layout, ParallelConfig
from fastgpt.parallel.order import gathered
from fastgpt.train.optimizer import OptimConfig
from tests.parallel_cases import CPU, LLAMA, SMALL, STEPS, Run, batch, made, same

CASES = [
    (config, sizes) for config in (SMALL, LLAMA) for sizes in ({"dp": 2}, {"fsdp": 2}, {"cp": 2})
]


def adapted(model: GPT) -> GPT:
    lora.add(model, LoraConfig(3, 6.0))
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


def trained(config: GPTConfig, layout: Layout) -> Run:
    model = layout.parallelize(adapted(made(config)))
    optimizer = OptimConfig(lr=1e-2, clip=0.3).build(model)
    losses, norms = [], []
    for step in range(STEPS):
        loss = layout.loss(model, batch(step, layout.data_rank, layout.data_world))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(layout.all_reduce(loss.detach(), "mean")))
        norms.append(float(optimizer.grad_norm))
    return Run(losses, norms, {name: gathered(t) for name, t in model.state_dict().items()})


def main() -> None:
    dist.init_process_group("gloo")
    for config, sizes in CASES:
        want = trained(config, Layout(ParallelConfig(), CPU))
        got = trained(config, Layout.start(ParallelConfig(**{"dp": 1, **sizes}), CPU))
        try:
            same(got, want)
        except AssertionError as error:
            raise AssertionError(f"{config.variant}, {sizes}: {error}") from error
    if dist.get_rank() == 0:
        print("all equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
