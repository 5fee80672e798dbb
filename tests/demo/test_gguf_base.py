"""The demo base's GGUF file, read tensor by tensor, beside transformers' own reading of the whole."""

import pytest
import torch

from adapterhub_local.base.source import open_source
from examples.demo import demo_base

pytestmark = [pytest.mark.demo_base, pytest.mark.timeout(900)]


def test_gguf_is_read_as_transformers_reads_it() -> None:
    """Reading a GGUF tensor by tensor gives what transformers' own conversion gives, rotary order too."""
    from transformers import AutoModelForCausalLM, GgufConfig

    demo_file = demo_base()
    source = open_source(demo_file)
    theirs = AutoModelForCausalLM.from_pretrained(
        demo_file.parent,
        gguf_file=demo_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).state_dict()

    assert source.names == {name for name in theirs if name != "lm_head.weight"}
    for name in sorted(source.names):
        assert torch.equal(source.read(name), theirs[name]), name
