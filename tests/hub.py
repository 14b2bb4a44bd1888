"""A Hugging Face Hub on loopback for tests: repositories in a folder, served to the real `huggingface_hub` client.

Only model repositories and LFS's basic transfer; the body of a request or of a reply is held in memory.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote
from uuid import uuid4

import yaml


USER = "someone"  # who the token belongs to
LFS_SUFFIXES = (".safetensors", ".bin")
LFS_SIZE = 1_000_000  # bytes above which any file is an LFS object
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


class HubError(Exception):
    """A reply that is an error: status, the Hub's error code, and what else goes into headers or JSON."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **fields):
        super().__init__(message)
        self.status = status
        ascii_message = message.encode("ascii", "backslashreplace").decode()
        self.headers = {"X-Error-Message": ascii_message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.fields = {"error": message, **fields}


class Disconnected(Exception):
    """The request did not arrive whole: nobody is left to reply to."""


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write_atomically(path: Path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


class Repository:
    """A repository on disk: `objects/<sha256>`, `commits/<id>.json`, `refs.json`, `settings.json`."""

    def __init__(self, folder: Path, lock: threading.RLock):
        self.folder = folder
        self.lock = lock

    @property
    def exists(self) -> bool:
        return (self.folder / "settings.json").is_file()

    @property
    def private(self) -> bool:
        return json.loads((self.folder / "settings.json").read_bytes())["private"]

    @property
    def refs(self) -> dict[str, str]:
        """Branches by their names and pull requests as `refs/pr/N`, each with its commit's id."""
        return json.loads((self.folder / "refs.json").read_bytes())

    def create(self, private: bool):
        first = self.write_commit(None, "initial commit", {".gitattributes": self.regular_file(GIT_ATTRIBUTES)})
        self.set_ref("main", first, {})
        write_atomically(self.folder / "settings.json", json.dumps({"private": private}).encode())

    def set_ref(self, name: str, commit_id: str, refs: dict[str, str]):
        write_atomically(self.folder / "refs.json", json.dumps({**refs, name: commit_id}).encode())

    def object_path(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def regular_file(self, content: bytes) -> dict:
        """Stores the content of a file that git itself keeps; returns the file's entry in a commit."""
        sha256 = hashlib.sha256(content).hexdigest()
        write_atomically(self.object_path(sha256), content)
        return {"sha256": sha256, "size": len(content), "lfs": False, "oid": git_blob_id(content)}

    def lfs_file(self, sha256: str, size: int | None) -> dict:
        """The entry in a commit of an LFS object, which has to be stored already."""
        stored = self.object_path(sha256)
        if not stored.is_file() or size not in (None, stored.stat().st_size):
            raise HubError(400, f"LFS object {sha256} of {size} bytes is not stored")
        size = stored.stat().st_size
        return {"sha256": sha256, "size": size, "lfs": True, "oid": git_blob_id(lfs_pointer(sha256, size))}

    def write_commit(self, parent: str | None, message: str, files: dict[str, dict]) -> str:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = {"parent": parent, "message": message, "date": date, "files": files}
        commit_id = hashlib.sha1(json.dumps(commit, sort_keys=True).encode()).hexdigest()
        content = json.dumps({"id": commit_id, **commit}).encode()
        write_atomically(self.folder / "commits" / f"{commit_id}.json", content)
        return commit_id

    def resolve(self, revision: str) -> dict:
        """The commit that a branch, a pull request's ref or a full commit id names."""
        commit_id = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        path = self.folder / "commits" / f"{commit_id}.json"
        if not COMMIT_ID.fullmatch(commit_id) or not path.is_file():
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return json.loads(path.read_bytes())

    def history(self, revision: str = "main") -> list[dict]:
        """The commits that lead to a revision, newest first."""
        commits = [self.resolve(revision)]
        while parent := commits[-1]["parent"]:
            commits.append(self.resolve(parent))
        return commits

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.object_path(self.resolve(revision)["files"][path]["sha256"]).read_bytes()

    def apply(self, change: dict, files: dict[str, dict]):
        """Makes one change of a commit, a line of its NDJSON, in `files`."""
        value = change["value"]
        path = value["path"]
        match change["key"]:
            case "file":
                files[path] = self.regular_file(base64.b64decode(value["content"]))
            case "lfsFile":
                files[path] = self.lfs_file(value["oid"], value.get("size"))
            case "deletedFile" if path in files:
                del files[path]
            case "deletedFile":
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            case key:
                raise HubError(400, f"Unknown operation: {key}")

    def commit(self, revision: str, header: dict, changes: list[dict], create_pr: bool) -> tuple[str, str]:
        """Commits to a branch or a pull request, or opens one on it: the ref that moved and the commit's id."""
        with self.lock:
            refs = self.refs
            if revision not in refs:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            parent = header.get("parentCommit") or refs[revision]
            if parent != refs[revision] and not create_pr:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = self.resolve(parent)["files"]
            for change in changes:
                self.apply(change, files)
            message = "\n\n".join(filter(None, [header["summary"], header.get("description")]))
            commit_id = self.write_commit(parent, message, files)
            number = sum(name.startswith("refs/pr/") for name in refs) + 1
            ref = f"refs/pr/{number}" if create_pr else revision
            self.set_ref(ref, commit_id, refs)
        return ref, commit_id

    def create_branch(self, name: str, starting_point: str):
        with self.lock:
            if name.startswith("refs/"):
                raise HubError(400, f"Invalid branch name: {name}")
            if name in self.refs:
                raise HubError(409, f"Reference already exists: {name}")
            self.set_ref(name, self.resolve(starting_point)["id"], self.refs)


REPO = r"(?P<repo_id>\w[\w.-]*(?:/\w[\w.-]*)?)"
REVISION = r"(?P<revision>[^/]+)"
PATH = r"(?P<path>.+)"
ROUTES = []


def route(methods: str, pattern: str):
    """Registers a method of the handler for the paths that match; the groups are its keyword arguments."""

    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


def find_route(method: str, path: str):
    for methods, pattern, function in ROUTES:
        if method in methods and (match := pattern.fullmatch(path)):
            return function, {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


class Handler(BaseHTTPRequestHandler):
    """One connection. A route's method returns what to send as JSON, or None where it has replied itself."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every reply on a kept connection waits 40 ms for the client's ACK
    hub: "LocalHub"

    def log_message(self, *args):
        pass  # the requests are in `hub.requests`

    def answer(self):
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        self.hub.requests.append((self.command, self.path))
        try:
            self.body = self.read_body()  # whole, also where the reply is an error: the next request follows it
            if self.headers.get("Authorization", self.hub.authorization) != self.hub.authorization:
                raise HubError(401, "Invalid credentials in Authorization header")
            function, groups = find_route(self.command, path)
            value = function(self, **groups)
            if value is not None:
                self.reply(200, json.dumps(value).encode())
        except HubError as error:
            self.reply(error.status, json.dumps(error.fields).encode(), error.headers)
        except Disconnected:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        size = int(self.headers.get("Content-Length", 0))
        if self.command == "PUT":
            with self.hub.lock:
                cut, self.hub.cut_upload_after = self.hub.cut_upload_after, None
            if cut is not None:
                self.rfile.read(min(size, cut))
                raise Disconnected
        body = self.rfile.read(size)
        if len(body) < size:
            raise Disconnected
        return body

    def reply(self, status: int, body: bytes, headers: dict | None = None, sent: int | None = None):
        """Sends a reply; with `sent`, only so many bytes of the promised body, and hangs up."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.close_connection |= sent is not None

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def require_token(self, code: str | None = None):
        if "Authorization" not in self.headers:  # a wrong one came no further than `answer`
            raise HubError(401, "Invalid username or password.", code)

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        """The repository, if whoever asks may read it, or write to it."""
        repository = self.hub.repository(repo_id)
        if write or not repository.exists or repository.private:
            self.require_token("RepoNotFound")
        if not repository.exists:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.require_token()
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/repos/create")
    def create_repo(self):
        self.require_token()
        wanted = json.loads(self.body)
        if wanted.get("type") not in (None, "model"):
            raise HubError(400, "Only model repositories")
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        with self.hub.lock:
            repository = self.hub.repository(repo_id)
            if repository.exists:
                raise HubError(409, "You already created this model repo", url=url)
            repository.create(private=wanted.get("private") or wanted.get("visibility") == "private")
        return {"url": url, "name": repo_id, "id": repo_id}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        match = FRONT_MATTER.match(json.loads(self.body)["content"])
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            metadata = str(error)
        if isinstance(metadata, dict) and metadata.get("license"):
            return {"warnings": [], "errors": []}
        problem = '"license" is required' if isinstance(metadata, dict) else f"no YAML metadata: {metadata}"
        raise HubError(400, "Invalid metadata in README.md", warnings=[], errors=[{"message": problem}])

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo_id: str, revision: str):
        present = self.repository(repo_id, write=True).resolve(revision)["files"]
        files = json.loads(self.body)["files"]
        return {"files": [upload_mode(file["path"], file["size"], present.get(file["path"])) for file in files]}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str):
        repository = self.repository(repo_id, write=True)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for wanted in objects:
            if not repository.object_path(wanted["oid"]).is_file():
                signature = self.hub.sign(repo_id, wanted["oid"])
                href = f"{self.hub.url}/{repo_id}.git/info/lfs/objects/{wanted['oid']}?signature={signature}"
                wanted["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", rf"/{REPO}\.git/info/lfs/objects/(?P<oid>[0-9a-f]{{64}})")
    def upload_lfs_object(self, repo_id: str, oid: str):
        # The client sends no token here, as to S3: the address is signed.
        if self.hub.refuse_uploads or self.query.get("signature") != self.hub.sign(repo_id, oid):
            raise HubError(403, "Request has expired")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content's SHA-256 is not the object's id")
        write_atomically(self.hub.repository(repo_id).object_path(oid), self.body)
        return {}

    @route("POST", f"/api/models/{REPO}/commit/{REVISION}")
    def commit(self, repo_id: str, revision: str):
        repository = self.repository(repo_id, write=True)
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        ref, commit_id = repository.commit(revision, header["value"], changes, self.flag("create_pr"))
        reply = {"success": True, "commitOid": commit_id, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit_id}"}
        if self.flag("create_pr"):
            reply["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{ref.rpartition('/')[2]}"
        return reply

    @route("POST", f"/api/models/{REPO}/branch/{REVISION}")
    def create_branch(self, repo_id: str, revision: str):
        starting_point = json.loads(self.body or b"{}").get("startingPoint", "main")
        self.repository(repo_id, write=True).create_branch(revision, starting_point)
        return {}

    @route("GET", f"/api/models/{REPO}/refs")
    def list_refs(self, repo_id: str):
        refs = self.repository(repo_id).refs
        listed = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, commit_id in refs.items():
            is_pull = name.startswith("refs/pr/")
            ref = {"name": name, "ref": name if is_pull else f"refs/heads/{name}", "targetCommit": commit_id}
            listed["pullRequests" if is_pull else "branches"].append(ref)
        return listed

    @route("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?")
    def model_info(self, repo_id: str, revision: str = "main"):
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit["id"],
            "lastModified": commit["date"],
            "private": repository.private,
            "siblings": [{"rfilename": path} for path in commit["files"]],
            "tags": [],
        }

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/{PATH})?")
    def tree(self, repo_id: str, revision: str, path: str = ""):
        commit = self.repository(repo_id).resolve(revision)
        prefix = path + "/" if path else ""
        entries = {}
        for name, file in commit["files"].items():
            if name.startswith(prefix):
                *folders, _ = name.removeprefix(prefix).split("/")
                for depth in range(1, len(folders) + 1) if self.flag("recursive") else [1] * bool(folders):
                    folder = prefix + "/".join(folders[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "oid": git_blob_id(folder.encode())}
                if self.flag("recursive") or not folders:
                    entries[name] = tree_entry(name, file)
        if path and not entries:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit["id"]})
        return list(entries.values())

    @route("GET HEAD", f"/{REPO}/resolve/{REVISION}/{PATH}")
    def resolve_file(self, repo_id: str, revision: str, path: str):
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit["id"]}
        if path not in commit["files"]:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = commit["files"][path]
        etag = f'"{file["sha256"] if file["lfs"] else file["oid"]}"'
        headers |= {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file["lfs"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(file["size"])}
        self.reply_with_content(path, repository.object_path(file["sha256"]).read_bytes(), headers)

    def reply_with_content(self, path: str, content: bytes, headers: dict):
        """Sends a file or the range of it that is asked for, with the faults that are set for it."""
        size, status, start, end = len(content), 200, 0, len(content)
        if path == self.hub.corrupt and content:
            content = content[: size // 2] + bytes([content[size // 2] ^ 1]) + content[size // 2 + 1 :]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
            if start >= end:
                raise HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        # Nothing beyond the middle of the file is sent, so that the client cannot resume its way to the end.
        sent = max(0, size // 2 - start) if path == self.hub.truncate else None
        self.reply(status, content[start:end], headers, sent)


def upload_mode(path: str, size: int, present: dict | None) -> dict:
    """How a file is to be uploaded, and which content its path has already."""
    mode = "lfs" if path.endswith(LFS_SUFFIXES) or size > LFS_SIZE else "regular"
    oid = present and present["sha256" if present["lfs"] else "oid"]
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def tree_entry(path: str, file: dict) -> dict:
    """A file as the tree API describes it; with `expand` the Hub would add what nobody here asks for."""
    entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
    if file["lfs"]:
        pointer_size = len(lfs_pointer(file["sha256"], file["size"]))
        entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": pointer_size}
    return entry


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Shows the errors of this file; a client that hangs up is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LocalHub:
    """The server, as a context manager. `requests` lists every (method, path) as sent, in order of arrival.

    Faults, all of them off at first:
    `cut_upload_after`: hang up on the next LFS upload after so many bytes, once; the client tries again by itself.
    `refuse_uploads`: answer every LFS upload with 403, which the client does not try again.
    `corrupt`: path of a file that is sent with one bit flipped.
    `truncate`: path of a file of which the first half is sent, however often it is asked for.
    """

    def __init__(self, folder: Path, token: str = "hf_secret"):
        self.folder = Path(folder)
        self.token = token
        self.authorization = f"Bearer {token}"
        self.lock = threading.RLock()
        self.requests: list[tuple[str, str]] = []
        self.cut_upload_after: int | None = None
        self.refuse_uploads = False
        self.corrupt: str | None = None
        self.truncate: str | None = None
        self.server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def repository(self, repo_id: str) -> Repository:
        """A repository as it lies on disk, for tests to look into: `refs`, `history()`, `resolve()`, `read()`."""
        return Repository(self.folder / repo_id, self.lock)

    def sign(self, repo_id: str, oid: str) -> str:
        """The signature that allows an upload to this address without a token."""
        return hmac.new(self.token.encode(), f"{repo_id}:{oid}".encode(), "sha256").hexdigest()

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """The variables of a process whose Hub this is, with no other settings of the Hub's client than these."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), **({"HF_TOKEN": token} if token else {})}
        flags = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return kept | own | flags | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
