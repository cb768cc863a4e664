import sys

import pytest

import warm
from ui.pages import Server, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(folder, accelerator):
    server = Server(sys.executable if accelerator == "gpu" else warm.python(), folder)
    yield server
    server.close()
