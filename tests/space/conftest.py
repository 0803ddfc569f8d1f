"""A service on the checkpoint inside the package, which several tests use, and one on a tiny random model."""

import pytest

from fwd2bot.pipelines.embedded import gallery
from fwd2bot.space_app.collection import Shipped
from fwd2bot.space_app.options import SpaceOptions, load_service
from fwd2bot.space_app.service import Service


@pytest.fixture(scope="session")
def service():
    """Shared by the session; each test takes visitors of its own."""
    return load_service(SpaceOptions(device="cpu"))


@pytest.fixture
def tiny_service(shared_fwd2bot, tiny_processor):
    return Service(shared_fwd2bot, tiny_processor, Shipped(gallery()[:6]))


@pytest.fixture
def visitor(request):
    """The name of a session that no other test has."""
    return request.node.nodeid
