"""The rules by the names that all adapters give their classes."""

from vsgd import core

RULES = {"VSGD": core.VSGD, "ConstantVSGD": core.CONSTANT_VSGD}
