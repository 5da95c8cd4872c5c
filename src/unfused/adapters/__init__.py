"""Parameter-efficient fine-tuning, one module per paper.

`XConfig(PeftConfig)`, its model and its layer, registered with PEFT: `get_peft_model`, `save_pretrained`,
`from_pretrained`, several adapters, `disable_adapter`, and `merge_and_unload` where the method can merge.
"""

from unfused._lazy import lazy_family

__getattr__, __dir__, __all__ = lazy_family(__name__, __path__)
