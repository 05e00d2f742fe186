"""A small Hub on loopback, enough for the real huggingface_hub client: repositories with branches and commits,
preupload, LFS, commits with a parent, trees, and files by ranges. Tokens are "owner" (may do all) and "reader"; others
may see what is public. Everything lives in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from hf_cachegen.profiles import finding
from hf_cachegen.stores.segment_cache import DIRECTORY_VARIABLE
from tests.http_server import Request, Server, running

Files = dict[str, bytes]
LFS_BYTES = 200
"""Files of this size go through LFS."""


@dataclass
class Repo:
    """commits: id -> (parent, files, message); branches: name -> commit id."""

    private: bool
    commits: dict[str, tuple[str | None, Files, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, message: str, branch: str = "main") -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(repr((parent, sorted(files.items()), message)).encode()).hexdigest()
        self.commits[oid] = (parent, files, message)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]][1]


class HubServer(Server):
    """repos: "datasets/user/name" -> Repo. before_commit: called once, when the next commit comes in."""

    def __init__(self) -> None:
        super().__init__(HubRequest)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.agents: set[str] = set()
        self.before_commit: list[Callable[[], None]] = []


class HubRequest(Request):
    """The routes of the Hub's API that a push and a load take."""

    server: HubServer

    def setup(self) -> None:
        super().setup()
        self.body = b""

    def route(self) -> None:
        length = self.headers.get("Content-Length")
        self.body = self.rfile.read(int(length)) if length else self.chunks()
        path = urlsplit(self.path).path
        if path != "/api/agent-harnesses":  # what the client asks once in a process, for its user agent
            self.server.calls.append(f"{self.command} {unquote(path)}")
            if not path.startswith("/lfs/"):
                self.server.agents.add(self.headers.get("User-Agent", ""))
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                handler(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
                return
        self.answer(404, b"no such route")

    do_POST = do_PUT = do_GET = do_HEAD = route

    def chunks(self) -> bytes:
        data = b""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def json(self, value: Any, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, name: str, message: str) -> None:
        self.answer(code, json.dumps({"error": message}).encode(), {"X-Error-Code": name, "X-Error-Message": message})

    @property
    def user(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def repo(self, kind: str | None, repo: str, *, write: bool = False) -> Repo | None:
        found = self.server.repos.get(f"{kind or 'models'}/{repo}")
        if found is None or (found.private and self.user not in ("owner", "reader")):
            self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
            return None
        if write and self.user != "owner":
            self.refuse(403, "Forbidden", "no right to write")
            return None
        return found

    def commit_of(self, found: Repo, revision: str) -> str | None:
        oid = found.resolve(revision)
        if oid is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid


def create(request: HubRequest) -> None:
    asked = json.loads(request.body)
    if request.user != "owner":
        request.refuse(401, "Unauthorized", "Invalid username or password.")
        return
    name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
    if name in request.server.repos:
        request.json({"error": "You already created this repo", "url": f"{request.server.url}/{name}"}, 409)
        return
    repo = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
    repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
    request.server.repos[name] = repo
    request.json({"url": f"{request.server.url}/{name}"})


def validate_yaml(request: HubRequest) -> None:
    content = json.loads(request.body)["content"]
    errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
    request.json({"errors": errors, "warnings": []}, 400 if errors else 200)


def whoami(request: HubRequest) -> None:
    if request.user is None:
        request.refuse(401, "Unauthorized", "Invalid username or password.")
    else:
        request.json({"type": "user", "name": request.user, "orgs": [], "auth": {"type": "access_token"}})


def info(request: HubRequest, kind: str, repo: str, revision: str | None) -> None:
    if (found := request.repo(kind, repo)) and (oid := request.commit_of(found, revision or "main")):
        request.json({"id": repo, "sha": oid, "private": found.private, "siblings": [], "tags": [], "downloads": 0})


def listing(request: HubRequest, kind: str) -> None:
    """List the repositories of an author, with the names of their files if requested."""
    asked = parse_qs(urlsplit(request.path).query)
    rows = []
    for name, repo in request.server.repos.items():
        of_kind, _, repo_id = name.partition("/")
        seen = not repo.private or request.user in ("owner", "reader")
        if of_kind == kind and seen and [repo_id.split("/")[0]] == asked["author"]:
            files = {"siblings": [{"rfilename": path} for path in repo.files]} if "siblings" in asked["expand"] else {}
            rows.append({"id": repo_id, **files})
    request.json(rows)


def branch(request: HubRequest, kind: str, repo: str, revision: str) -> None:
    if found := request.repo(kind, repo, write=True):
        if revision in found.branches:
            request.json({"error": "Reference already exists"}, 409)
            return
        found.branches[revision] = found.branches["main"]
        request.json({})


def tree(request: HubRequest, kind: str, repo: str, revision: str, folder: str | None) -> None:
    if not (found := request.repo(kind, repo)) or not (oid := request.commit_of(found, revision)):
        return
    prefix = f"{folder}/" if folder else ""
    recursive = "recursive=true" in request.path.lower()
    rows: dict[str, dict[str, Any]] = {}
    for path, data in found.commits[oid][1].items():
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix)
        if "/" in inner and not recursive:
            name = prefix + inner.partition("/")[0]
            rows[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            continue
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        rows[path] = {"type": "file", "path": path, "oid": blob, "size": len(data)}
    if prefix and not rows:
        request.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return
    request.json(list(rows.values()))


def preupload(request: HubRequest, kind: str, repo: str, revision: str) -> None:
    if request.repo(kind, repo, write=True):
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_BYTES else "regular", "shouldIgnore": False}
            for f in json.loads(request.body)["files"]
        ]
        request.json({"files": files})


def lfs_batch(request: HubRequest, kind: str | None, repo: str) -> None:
    if request.repo(kind, repo, write=True):
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            action = {"upload": {"href": f"{request.server.url}/lfs/{wanted['oid']}", "header": {}}}
            known = wanted["oid"] in request.server.lfs
            objects.append({**wanted, **({} if known else {"actions": action})})
        request.json({"transfer": "basic", "objects": objects})


def lfs_put(request: HubRequest, oid: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != oid:
        request.answer(400, b"wrong content")
        return
    request.server.lfs[oid] = request.body
    request.answer(200)


def commit(request: HubRequest, kind: str, repo: str, revision: str) -> None:
    if request.server.before_commit:
        request.server.before_commit.pop(0)()
    if not (found := request.repo(kind, repo, write=True)) or not (head := request.commit_of(found, revision)):
        return
    files, message = dict(found.commits[head][1]), ""
    for line in request.body.splitlines():
        row = json.loads(line)
        value = row["value"]
        if row["key"] == "header":
            message = value["summary"]
            if value.get("parentCommit") not in (None, head):
                request.refuse(412, "StaleParent", "A commit has happened since. Please refresh and try again.")
                return
        elif row["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif row["key"] == "lfsFile":
            files[value["path"]] = request.server.lfs[value["oid"]]
        elif row["key"] == "deletedFile":
            del files[value["path"]]
    pull = "create_pr=1" in request.path
    oid = found.commit(files, message, "refs/pr/1" if pull else revision)
    url = f"{request.server.url}/{kind}/{repo}"
    answer = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": f"{url}/discussions/1"}
    request.json({name: value for name, value in answer.items() if pull or name != "pullRequestUrl"})


def resolve(request: HubRequest, kind: str | None, repo: str, revision: str, path: str) -> None:
    request.server.requests.append((path, request.headers))
    if not (found := request.repo(kind, repo)) or not (oid := request.commit_of(found, revision)):
        return
    data = found.commits[oid][1].get(path)
    if data is None:
        request.refuse(404, "EntryNotFound", "Entry not found")
        return
    fault = request.server.take_fault()
    headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
    status, body = request.ranged(data, headers)
    if fault is None:
        request.answer(status, body, headers)
    else:
        fault(request, body, headers)


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", r"/api/whoami-v2", whoami),
    ("GET", r"/api/(?P<kind>models|datasets)", listing),
    ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", info),
    ("POST", _API + r"/branch/(?P<revision>[^/]+)", branch),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", _GIT + r"\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", commit),
    ("GET", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("HEAD", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]  # fmt: skip


def point_client_at(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the real client at this server, online and without XET."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + urlsplit(template).path)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Transformers keeps a client of its own, of the endpoint that there was when it was first asked for.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, *, token: str | None = None) -> Iterator[HubServer]:
    """Run a Hub. Without a stored token the client sends only those that a call names."""
    if token is None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with running(HubServer()) as found:
        assert isinstance(found, HubServer)
        point_client_at(found, monkeypatch)
        yield found


@contextmanager
def hub_of_profiles(monkeypatch: pytest.MonkeyPatch, segments: Path) -> Iterator[HubServer]:
    """Run a Hub for its owner, with segments kept in that folder and no known locations of profiles."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(segments))
    finding._on_hub.cache_clear()
    with running_hub(monkeypatch, token="owner") as found:
        yield found
    finding._on_hub.cache_clear()
