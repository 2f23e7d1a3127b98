"""Our kernels for a Hugging Face model: `accelerate(model)`, undone by `handle.undo()`.

    from fastllm.integrations.transformers import accelerate

    handle = accelerate(model)  # a PreTrainedModel, or a PEFT model around one
    print(handle.report)        # what was replaced by which kernel, what was left, and why
    handle.undo()

Nothing global is changed: a forward is bound to each instance, and the model's modules get a copy of their config that
names our attention. Parameters, buffers, their names and their owners stay as they are, so state_dict, optimizers, PEFT,
generate, Trainer, checkpointing and torch.compile go on. transformers 4.57 and later.
"""

from .accelerate import FAMILIES, Handle, Report, accelerate

__all__ = ["FAMILIES", "Handle", "Report", "accelerate"]
