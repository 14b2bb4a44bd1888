"""
A Hugging Face Hub on loopback for tests: repositories in memory, served to the real `huggingface_hub` client.

Only model repositories and LFS's basic transfer.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote


USER, TOKEN = "someone", "hf_secret"
LFS_SUFFIXES = (".safetensors", ".bin")
LFS_SIZE = 1_000_000  # bytes above which any file is an LFS object
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """A reply that is an error: status, the Hub's error code, and what else goes into headers or JSON."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **fields):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.fields = {"error": message, **fields}


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Objects by their SHA-256, commits by their ids, and refs: branches by name, pull requests as `refs/pr/N`."""

    def __init__(self, private: bool):
        self.private = private
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, dict] = {}
        self.refs = {"main": self.write_commit(None, "initial commit", {".gitattributes": self.store(GIT_ATTRIBUTES)})}

    def store(self, content: bytes, is_lfs: bool = False) -> dict:
        """Stores a file, and returns its entry in a commit."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return {"sha256": sha256, "size": len(content), "lfs": is_lfs, "oid": git_blob_id(content)}

    def write_commit(self, parent: str | None, message: str, files: dict[str, dict]) -> str:
        commit = {"parent": parent, "message": message, "files": files}
        commit_id = hashlib.sha1(json.dumps(commit, sort_keys=True).encode()).hexdigest()
        self.commits[commit_id] = {"id": commit_id, **commit}
        return commit_id

    def resolve(self, revision: str) -> dict:
        """The commit that a branch, a pull request's ref or a full commit id names."""
        commit_id = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, revision: str = "main") -> list[dict]:
        """The commits that lead to a revision, newest first."""
        commits = [self.resolve(revision)]
        while parent := commits[-1]["parent"]:
            commits.append(self.resolve(parent))
        return commits

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.objects[self.resolve(revision)["files"][path]["sha256"]]

    def commit(self, revision: str, header: dict, changes: list[dict], create_pr: bool) -> tuple[str, str]:
        """Commits to a branch, or opens a pull request on it: the ref that moved and the commit's id."""
        parent = self.resolve(revision)
        files = dict(parent["files"])
        for change in changes:  # lines of the request's NDJSON
            value, path = change["value"], change["value"]["path"]
            match change["key"]:
                case "file":
                    files[path] = self.store(base64.b64decode(value["content"]))
                case "lfsFile":
                    files[path] = self.store(self.objects[value["oid"]], is_lfs=True)
                case "deletedFile":
                    del files[path]
                case key:
                    raise HubError(400, f"Unknown operation: {key}")
        number = sum(name.startswith("refs/pr/") for name in self.refs) + 1
        ref = f"refs/pr/{number}" if create_pr else revision
        self.refs[ref] = self.write_commit(parent["id"], header["summary"], files)
        return ref, self.refs[ref]


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


class Handler(BaseHTTPRequestHandler):
    """One connection. A route's method returns what to send as JSON, or None where it has replied itself."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every reply on a kept connection waits 40 ms for the client's ACK
    hub: "LocalHub"

    def log_message(self, *args):
        pass

    def answer(self):
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        try:
            # The body is read also where the reply is an error, because the next request follows it.
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
                raise HubError(401, "Invalid credentials in Authorization header")
            value = self.call_route(path)
            if value is not None:
                self.reply(200, json.dumps(value).encode())
        except HubError as error:
            self.reply(error.status, json.dumps(error.fields).encode(), error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def call_route(self, path: str):
        for methods, pattern, function in ROUTES:
            if self.command in methods and (match := pattern.fullmatch(path)):
                return function(self, **{name: unquote(text) for name, text in match.groupdict().items() if text})
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def reply(self, status: int, body: bytes, headers: dict | None = None, sent: int | None = None):
        """Sends a reply; with `sent`, only so many bytes of the promised body, and hangs up."""
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.close_connection |= sent is not None

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def require_token(self, code: str | None = None):
        if "Authorization" not in self.headers:  # `answer` has refused a wrong one
            raise HubError(401, "Invalid username or password.", code)

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        """The repository, if whoever asks may read it, or write to it."""
        repository = self.hub.repositories.get(repo_id)
        if write or repository is None or repository.private:
            self.require_token("RepoNotFound")
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    @route("POST", "/api/repos/create")
    def create_repo(self):
        self.require_token()
        options = json.loads(self.body)
        repo_id = f"{options.get('organization') or USER}/{options['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        private = bool(options.get("private")) or options.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private)
        return {"url": url, "name": repo_id, "id": repo_id}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"warnings": [], "errors": []}

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo_id: str, revision: str):
        self.repository(repo_id, write=True).resolve(revision)
        files = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return {"files": files}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str):
        repository = self.repository(repo_id, write=True)
        objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in json.loads(self.body)["objects"]]
        for entry in objects:
            if entry["oid"] not in repository.objects:
                href = f"{self.hub.url}/{repo_id}.git/info/lfs/objects/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", rf"/{REPO}\.git/info/lfs/objects/(?P<oid>[0-9a-f]{{64}})")
    def upload_lfs_object(self, repo_id: str, oid: str):
        if self.hub.refuse_uploads:  # the client sends no token here, as to S3
            raise HubError(403, "Request has expired")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content's SHA-256 is not the object's id")
        self.hub.repositories[repo_id].objects[oid] = self.body
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
        repository = self.repository(repo_id, write=True)
        if revision in repository.refs:
            raise HubError(409, f"Reference already exists: {revision}")
        repository.refs[revision] = repository.refs["main"]
        return {}

    @route("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?")
    def model_info(self, repo_id: str, revision: str = "main"):
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        files = [{"rfilename": path} for path in commit["files"]]
        return {"id": repo_id, "sha": commit["id"], "private": repository.private, "siblings": files}

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/{PATH})?")
    def tree(self, repo_id: str, revision: str, path: str = ""):
        """The files of a folder, without the folders in it, for which nobody here asks."""
        commit = self.repository(repo_id).resolve(revision)
        prefix = path + "/" if path else ""
        files = {name: file for name, file in commit["files"].items() if name.startswith(prefix)}
        if path and not files:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit["id"]})
        is_listed = self.flag("recursive")
        return [tree_entry(name, file) for name, file in files.items() if is_listed or "/" not in name[len(prefix) :]]

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
        self.reply_with_content(path, repository.objects[file["sha256"]], headers)

    def reply_with_content(self, path: str, content: bytes, headers: dict):
        """Sends a file or the range of it that is asked for, with the faults that are set for it."""
        size, status, start, end = len(content), 200, 0, len(content)
        if path == self.hub.corrupt and content:
            content = content[: size // 2] + bytes([content[size // 2] ^ 1]) + content[size // 2 + 1 :]
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(byte_range[1]), min(size, int(byte_range[2] or size) + 1)
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        # Nothing beyond the middle of the file is sent, so that the client cannot resume its way to the end.
        sent = max(0, size // 2 - start) if path == self.hub.truncate else None
        self.reply(status, content[start:end], headers, sent)


def tree_entry(path: str, file: dict) -> dict:
    entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
    if file["lfs"]:
        entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
    return entry


class LocalHub:
    """The server, as a context manager. Tests look into `repositories`.

    Faults, all of them off at first:
    `refuse_uploads`: answer every LFS upload with 403, which the client does not try again.
    `corrupt`: path of a file that is sent with one bit flipped.
    `truncate`: path of a file of which the first half is sent, however often it is asked for.
    """

    token = TOKEN

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.refuse_uploads = False
        self.corrupt: str | None = None
        self.truncate: str | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """The variables of a process whose Hub this is, with no other settings of the Hub's client than these."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), **({"HF_TOKEN": token} if token else {})}
        flags = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        return kept | own | flags | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
