"""The rules, by the class names that all adapters use."""

from vsgd import core

RULES = {"VSGD": core.VSGD, "ConstantVSGD": core.CONSTANT_VSGD}
