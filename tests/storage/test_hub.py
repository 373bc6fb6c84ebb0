"""Defenses come from the Hub and go there, by its own protocol, from a server of this test's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from ebm_defense.commands.main import main
from ebm_defense.errors import UsageError
from ebm_defense.storage.folders import find_folder, save_defense, shipped_folder
from ebm_defense.storage.hub import Address, address
from ebm_defense.storage.weights import load_defense, load_energy, load_purifier

hub = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")

SHIPPED, NAME = "fashion-mnist-gaussian", "somebody/robust"
LARGE = ".safetensors"
"""What the server takes by the protocol of large files, as the Hub does."""


class Hub:
    """A server's repositories: by name, branches of files, and the large files by their hash."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.downloads: list[str] = []

    def commit(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch, or of the commit of that hash."""
        branches = self.branches.get(name, {})
        found = (b for key, b in branches.items() if revision in (key, sha(b)))
        return next(found, None)


def sha(files: dict[str, bytes]) -> str:
    named = b"".join(k.encode() + hashlib.sha1(v).digest() for k, v in sorted(files.items()))
    return hashlib.sha1(named).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """What the Hub answers to the requests of huggingface_hub for models."""

    store: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._found(with_body=True)

    def do_HEAD(self) -> None:
        self._found(with_body=False)

    def _found(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            name, _, revision = found.groups()
            files = self.store.commit(name, revision or "main")
            return self._listed(name, files, tree="/tree/" in path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups(), with_body)
        return self._json({"error": f"no such thing: {path}"}, 404)

    def _listed(self, name: str, files: dict[str, bytes] | None, tree: bool) -> None:
        if files is None:
            missing = "RevisionNotFound" if name in self.store.branches else "RepoNotFound"
            return self._json({"error": missing}, 404, {"X-Error-Code": missing})
        if tree:
            return self._json(
                [
                    {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                    for k, v in files.items()
                ]
            )
        siblings = [{"rfilename": k} for k in files]
        return self._json({"id": name, "sha": sha(files), "siblings": siblings})

    def _file(self, name: str, revision: str, file: str, with_body: bool) -> None:
        files = self.store.commit(name, revision)
        if files is None or file not in files:
            return self._json({"error": "EntryNotFound"}, 404, {"X-Error-Code": "EntryNotFound"})
        content = files[file]
        if with_body:
            self.store.downloads.append(file)
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha(files)}
        return self._send(content, 200, headers, with_body)

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        for pattern, answer in POSTS.items():
            if found := re.fullmatch(pattern, path):
                return answer(self, body, *found.groups())
        return self._json({"error": f"no such thing: {path}"}, 404)

    def _valid(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        branches = self.store.branches[name]
        branches.setdefault(branch, dict(branches["main"]))
        self._json({})

    def _modes(self, body: bytes) -> None:
        self._json({"files": [self._mode(f["path"]) for f in json.loads(body)["files"]]})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else NAME
        if name.startswith("forbidden"):
            return self._json({"error": "you may not write there"}, 403)
        known = name in self.store.branches
        self.store.branches.setdefault(name, {"main": {}})
        if asked.get("private") or asked.get("visibility") == "private":
            self.store.private.add(name)
        return self._json({"url": f"{self._home()}/{name}"}, 409 if known else 200)

    def _mode(self, path: str) -> dict[str, object]:
        mode = "lfs" if path.endswith(LARGE) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _batch(self, body: bytes) -> None:
        asked = json.loads(body)
        objects = [
            o | {"actions": {"upload": {"href": f"{self._home()}/objects/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        oid, content = self.path.rpartition("/")[2], self._body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.store.objects[oid] = content
        self._json({})

    def _commit(self, body: bytes, name: str, branch: str) -> None:
        files = self.store.branches[name][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.store.objects[value["oid"]]
        oid = sha(files)
        url = f"{self._home()}/{name}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _home(self) -> str:
        return f"http://{self.headers['Host']}"

    def _json(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._send(json.dumps(content).encode(), status, headers or {}, self.command != "HEAD")

    def _send(self, content: bytes, status: int, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


POSTS = {
    "/api/repos/create": Handler._create,
    "/api/validate-yaml": Handler._valid,
    "/api/models/([^/]+/[^/]+)/branch/(.+)": Handler._branch,
    "/api/models/.+/preupload/.+": Handler._modes,
    r"/.+\.git/info/lfs/objects/batch": Handler._batch,
    "/api/models/([^/]+/[^/]+)/commit/(.+)": Handler._commit,
}
"""What is asked by POST, by path."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server on this machine, which huggingface_hub takes for the Hub, and an empty cache."""
    store = Hub()
    handler = type("Handler", (Handler,), {"store": store})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "a-token")
        yield store
        http.shutdown()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    wanted = ("defense.toml", "SHA256SUMS", "README.md")
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == LARGE or p.name in wanted
    }


def test_a_defense_is_loaded_from_the_hub_once(server: Hub) -> None:
    server.branches[NAME] = {
        "main": files_of(shipped_folder() / SHIPPED) | {"logs/big.bin": b"not a defense's"}
    }
    there, here = load_defense(f"hf://{NAME}"), load_defense(SHIPPED)
    assert there.purifier.numbers == here.purifier.numbers
    states = (there.classifier.state_dict(), here.classifier.state_dict())
    assert all(map(torch.equal, *(s.values() for s in states)))
    assert "defense.toml" in server.downloads
    assert "logs/big.bin" not in server.downloads
    server.downloads.clear()
    load_purifier(f"hf://{NAME}@main")
    assert not server.downloads


def test_a_revision_is_a_branch_or_a_commit(server: Hub) -> None:
    other = files_of(shipped_folder() / "fashion-mnist")
    server.branches[NAME] = {"main": files_of(shipped_folder() / SHIPPED), "ebm": other}
    with pytest.raises(UsageError, match="has no energy"):
        load_energy(f"hf://{NAME}")
    for revision in ("ebm", sha(other)):
        assert load_energy(f"hf://{NAME}@{revision}").settings == load_energy().settings
    with pytest.raises(UsageError, match="no such revision"):
        load_defense(f"hf://{NAME}@nowhere")


def test_what_was_tampered_with_or_is_no_defense_is_refused(server: Hub) -> None:
    files = files_of(shipped_folder() / SHIPPED)
    content = files["classifier.safetensors"]
    server.branches[NAME] = {
        "main": files | {"classifier.safetensors": content[:-1] + bytes([content[-1] ^ 1])},
        "empty": {"README.md": b"# nothing"},
    }
    with pytest.raises(UsageError, match=r"is not the file that SHA256SUMS lists"):
        load_defense(f"hf://{NAME}")
    with pytest.raises(UsageError, match=r"holds no defense\.toml"):
        load_defense(f"hf://{NAME}@empty")
    with pytest.raises(UsageError, match="does not exist or is not yours"):
        load_defense("hf://nobody/nothing")


@pytest.mark.parametrize("branch", ["", "@robust"])
def test_what_is_published_comes_back(server: Hub, branch: str, capsys) -> None:
    target = f"hf://{NAME}{branch}"
    assert main(["checkpoints", "publish", "fashion-mnist", target, "--private"]) == 0
    assert f"{NAME}/commit/" in capsys.readouterr().out
    assert server.private == {NAME}
    assert {Path(name).suffix for name in server.objects} == {""}
    assert len(server.objects) == 2  # large files went by their own protocol
    there, here = load_energy(target).state_dict(), load_energy().state_dict()
    assert all(map(torch.equal, there.values(), here.values()))
    assert main(["checkpoints", "verify", target]) == 0
    if branch:
        assert not server.branches[NAME]["main"]


def test_a_folder_without_a_card_is_given_one(server: Hub, tmp_path: Path) -> None:
    save_defense(
        load_defense(SHIPPED), tmp_path / "mine", description="A small one.", data="digits"
    )
    assert main(["checkpoints", "publish", str(tmp_path / "mine"), f"hf://{NAME}"]) == 0
    card = server.branches[NAME]["main"]["README.md"].decode()
    assert "A small one." in card
    assert f'load_defense("hf://{NAME}")' in card


def test_commands_take_addresses(server: Hub, tmp_path: Path, capsys) -> None:
    server.branches[NAME] = {"main": files_of(shipped_folder() / SHIPPED)}
    words = ["--images", "2", "--protocol", "quick", "--dry-run"]
    assert main(["evaluate", "--defense", f"hf://{NAME}", *words]) == 0
    assert main(["evaluate", "--purifier", f"hf://{NAME}", *words]) == 0


def test_what_the_hub_refuses_is_said_in_a_sentence(server: Hub, monkeypatch, capsys) -> None:
    publish = ["checkpoints", "publish", SHIPPED]
    assert main([*publish, "hf://forbidden/name"]) == 2
    assert "(status 403); run hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for asked in ([*publish, f"hf://{NAME}"], ["checkpoints", "verify", f"hf://{NAME}"]):
        assert main(asked) == 2
        error = capsys.readouterr().err
        assert f"hf://{NAME} cannot be reached (" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "bad", ["hf://", "hf://alone", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf://-a/b"]
)
def test_an_address_of_another_form_is_refused(bad: str) -> None:
    with pytest.raises(UsageError, match="is no address on the Hub; write hf://owner/name"):
        find_folder(bad)


def test_an_address_is_read() -> None:
    assert address("hf://a/b-1.c") == Address("a/b-1.c", None)
    assert address("hf://a/b@v1/x") == Address("a/b", "v1/x")
