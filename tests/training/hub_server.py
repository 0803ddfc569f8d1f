"""A small Hub on 127.0.0.1: the calls of huggingface_hub that an upload needs, and what arrived, in memory."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server holds: repositories with their settings, branches `(repo, branch)` with their files."""

    url: str = ""
    token: str = "hf_tests"
    repos: dict[str, dict] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by their SHA-256
    messages: list[str] = field(default_factory=list)


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)", path):
            files = self.hub.branches.get(found.groups())
            if files is None:
                return self._answer({"error": "no such revision"}, 404)
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()
            ]
            return self._answer(tree)
        self._answer({"error": f"no GET {path}"}, 404)

    def do_PUT(self) -> None:  # noqa: N802
        self.hub.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:  # noqa: N802
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'tester'}/{asked['name']}"
            self.hub.repos.setdefault(repo, asked)
            self.hub.branches.setdefault((repo, "main"), {".gitattributes": b""})
            return self._answer({"url": f"{self.hub.url}/{repo}", "id": repo})
        if found := re.fullmatch(r"/api/models/(.+)/branch/([^/]+)", path):
            repo, branch = found.groups()
            self.hub.branches.setdefault((repo, branch), dict(self.hub.branches[repo, "main"]))
            return self._answer({})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/([^/]+)", path):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/([^/]+)", path):
            self._commit(*found.groups(), [json.loads(line) for line in body.splitlines()])
            oid = f"{len(self.hub.messages):040x}"
            return self._answer({"commitUrl": f"{self.hub.url}/{found[1]}/commit/{oid}", "commitOid": oid})
        self._answer({"error": f"no POST {path}"}, 404)

    def _commit(self, repo: str, branch: str, lines: list[dict]) -> None:
        files = self.hub.branches[repo, branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
