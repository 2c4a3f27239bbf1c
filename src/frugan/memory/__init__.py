"""The memory engine, a library of its own: it finds, predicts, holds and repairs a way of training that fits into a budget.

It works for any `torch.nn.Module` and any loss that gives one term a sample; see `Engine`, and ``examples/``. The parts, from the
bottom:

- `layout`: how a phase computes its batch, by micro-batches and levers, and what each guarantees; `plan`: what was decided.
- `limit`: the memory of this process: how much it is, was at most, and may be.
- `levers`: the same gradients in less memory; `batchnorm`: under batch norm too.
- `trace`: what a computation allocates; `calls`: what need not be run for that; `growth`: what it would with any number of
  samples, from two small traces.
- `pool`: where tensors of the CPU lie; `segments`: what an accelerator holds for tensors.
- `search`: the fastest layout that fits; `budget`: the plan of all phases within a budget, or the smallest that would do.
- `spare`: does without what memory does not suffice for.
- `recover`: goes on in a cheaper way when memory runs out.
- `optimizer`: what anyone's optimizer makes and allocates.
- `engine`: all of that for one module and one loss.
"""

from frugan.memory.engine import Engine
from frugan.memory.layout import Guarantee, Layout, split
from frugan.memory.levers import accumulate

__all__ = ["Engine", "Guarantee", "Layout", "accumulate", "split"]
