"""Drops the output of other libraries that a user could not act on; everything else is passed on."""

import logging
import warnings

# bitsandbytes would like to download a CPU kernel; we want none that is not in its package
_KERNEL_COMPLAINT = "gemm_4bit_forward"
_WARNINGS = (
    ".*Paged optimizers are not supported on CPU.*",  # a recipe for the GPU runs on the CPU too, as it should
    ".*is_gradient_checkpointing.*",  # transformers deprecates a name that PEFT asks for
)


def hush() -> None:
    """Filter those lines from now on; call it before bitsandbytes is imported. Calling it twice does no harm."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_kernel_complaint)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _is_not_kernel_complaint(record: logging.LogRecord) -> bool:
    return _KERNEL_COMPLAINT not in record.getMessage()
