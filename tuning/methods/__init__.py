"""The methods: each makes a prompt out of fp32 parameters, and the files that PEFT would save of it.

| method | what is trained | what the file holds |
|---|---|---|
| prompt_tuning | k vectors (Lester et al. 2021) | the same |
| p_tuning | an encoder of k vectors (Liu et al. 2021) | the encoder's output |
| p_tuning_v2 | every layer's keys and values (Liu et al. 2022) | the same |
| prefix_tuning | an MLP that gives them (Li & Liang 2021) | the MLP's output |
| cartridge | keys and values distilled from a text (Eyuboglu et al. 2025) | the same |
"""

from tuning.methods.base import BackboneFacts as BackboneFacts
from tuning.methods.base import SoftPrompt as SoftPrompt
from tuning.methods.base import save_peft_files as save_peft_files
from tuning.methods.build import PromptBuilder as PromptBuilder
from tuning.methods.cartridge import Teacher as Teacher
