"""A pytest plugin, `-p tests.torchvision_on_cpu`: torchvision must be there, also where it was built for CUDA.

Beside a CPU build of torch the operators of such a torchvision do not load; then neither it nor transformers can be
imported. The image processors need none of these operators, only that their names exist. Where torchvision imports by
itself this changes nothing.
"""

import pytest
import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    operators = torch.library.Library("torchvision", "DEF")  # they exist for as long as this object does
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that asks for torchvision and did not get it has failed."""
    report = yield
    if report.skipped and "torchvision" in str(report.longrepr):
        report.outcome = "failed"
    return report
