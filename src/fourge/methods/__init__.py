"""Methods by name: each turns the weights of a group and its calibration statistics into NVFP4, one file each."""

from collections.abc import Mapping

from fourge.errors import InputError
from fourge.methods.base import Method
from fourge.methods.curvature_methods import AlongCurvature, gptq_under_searched_scales, replay_from_max_scales
from fourge.methods.max import Max
from fourge.methods.search import Search

METHODS: Mapping[str, Method] = {
    "max": Max(),
    "search": Search(),
    "gptq": AlongCurvature(gptq_under_searched_scales),
    "replay": AlongCurvature(replay_from_max_scales),
    "tuned": AlongCurvature(replay_from_max_scales, compensates=True),
}


def find_method(name: str) -> Method:
    """The method called `name`; InputError lists the known ones."""
    if name not in METHODS:
        raise InputError(f"--method {name} is not known; known are: {', '.join(METHODS)}")
    return METHODS[name]
