"""What the test Hub answers, route by route. Every route ends by raising an `Answer`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

import hub_jobs
from hub_store import Blob, Commit, Repo, is_large, tree_entry

if TYPE_CHECKING:
    from email.message import Message

    from hub_server import HubServer

_VERBS = ("revision", "tree", "paths-info", "auth-check", "preupload", "commit", "refs", "settings")


class Answer(Exception):
    """Ends the handling of a request with a status."""

    def __init__(self, status: int, body: Any = None, **headers: str) -> None:
        self.status = status
        self.body = b"" if body is None else body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Stream(Exception):
    """Ends the handling of a request with server-sent events."""

    def __init__(self, events: Iterator[dict[str, Any]]) -> None:
        self.events = events


class Routes:
    """The part of the request handler that knows the Hub's protocol."""

    hub: HubServer
    name: str  # "hub" or "cdn"
    user: str | None  # the account whose token came with the request
    account: dict[str, Any] | None
    headers: Message
    command: str

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        parts = [unquote(part) for part in path.split("/") if part]
        if self.name == "cdn" or path.startswith("/lfs-"):
            self._lfs_storage(parts, query, body)
        if path == "/.well-known/openid-configuration":
            sign_in = f"{self.hub.url()}/oauth"
            ends = ("authorization", "token", "userinfo")
            raise Answer(200, {f"{end}_endpoint": f"{sign_in}/{end}" for end in ends})
        if path == "/api/whoami-v2":
            self._need_user()
            raise Answer(200, self.account)
        if path == "/api/repos/create":
            self._create(json.loads(body))
        if path == "/api/validate-yaml":
            self._validate_yaml(json.loads(body)["content"])
        if parts[:2] == ["api", "jobs"]:
            status, answer = hub_jobs.route(
                self.hub, self.user, self.command, parts[2:], query, body
            )
            if not isinstance(answer, (dict, list)):
                raise Stream(answer)
            raise Answer(status, answer)
        if parts[:2] == ["api", "buckets"]:
            self._bucket("/".join(parts[2:]))
        if parts[:2] == ["api", "collections"]:
            self._collection("/".join(parts[2:]), body)
        if parts[:1] == ["api"] and parts[1] in ("models", "datasets", "spaces"):
            self._api(parts[1][:-1], parts[2:], query, body)
        if "resolve" in parts:
            at = parts.index("resolve")
            kind = "model"
            if parts[0] in ("datasets", "spaces"):
                kind, parts, at = parts[0][:-1], parts[1:], at - 1
            self._resolve(kind, "/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        if path.endswith(".git/info/lfs/objects/batch"):
            of, _, rest = path[1 : path.index(".git/info")].partition("/")
            kind = of[:-1] if of in ("datasets", "spaces") else "model"
            repo = self._repo(kind, unquote(f"{of}/{rest}" if kind == "model" else rest))
            self._need_write(repo)
            raise Answer(
                200, {"objects": [self._lfs_action(o) for o in json.loads(body)["objects"]]}
            )

    def _need_user(self) -> None:
        if self.user is None:
            raise Answer(401, {"error": "Invalid username or password."})

    def _owns(self, namespace: str) -> bool:
        account = self.account or {}
        mine = {account.get("name"), *(org["name"] for org in account.get("orgs", []))}
        return namespace in mine

    def _repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        hidden = repo is not None and repo.private and not self._owns(repo_id.split("/")[0])
        if repo is None or hidden:
            status = 404 if self.user else 401
            raise Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def _need_write(self, repo: Repo) -> None:
        self._need_user()
        read_only = (self.account or {})["auth"]["accessToken"]["role"] == "read"
        if read_only or not self._owns(repo.id.split("/")[0]):
            message = "You don't have the required permissions to write to this repository"
            raise Answer(403, {"error": message}, X_Error_Message=message)

    def _commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Answer(
                404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound"
            )
        return commit

    def _api(self, kind: str, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        if not parts:
            self._search(kind, query)
        n_id = 1 if len(parts) == 1 or parts[1] in _VERBS else 2
        repo_id, rest = "/".join(parts[:n_id]), parts[n_id:]
        if repo_id in self.hub.aliases:
            target = "/".join(["", "api", f"{kind}s", self.hub.aliases[repo_id], *rest])
            raise Answer(307, {}, Location=target)
        repo = self._repo(kind, repo_id)
        verb = rest[0] if rest else "revision"
        revision = rest[1] if len(rest) > 1 else "main"
        if verb == "volumes":
            self._need_write(repo)
            repo.extra["volumes"] = json.loads(body)["volumes"]
            raise Answer(200, {})
        if verb == "auth-check":
            if revision == "write":
                self._need_write(repo)
            raise Answer(200, {})
        commit = self._commit_at(repo, revision)
        if verb == "revision":
            raise Answer(200, self._info(repo, commit, "blobs" in query))
        if verb == "tree":
            whole = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            raise Answer(200, self._tree(commit, "/".join(rest[2:]), whole))
        if verb == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            found = [tree_entry(p, commit.files[p]) for p in wanted if p in commit.files]
            raise Answer(200, found)
        if verb == "preupload":
            self._need_write(repo)
            files = [self._upload_mode(commit, file) for file in json.loads(body)["files"]]
            raise Answer(200, {"files": files})
        if verb == "commit":
            self._need_write(repo)
            self._make_commit(repo, revision, body)

    def _tree(self, commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders right under a folder; with `recursive` all files there are."""
        start = f"{folder}/" if folder else ""
        below = {p: blob for p, blob in sorted(commit.files.items()) if p.startswith(start)}
        if folder and not below:
            raise Answer(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")
        if recursive:
            return [tree_entry(path, blob) for path, blob in below.items()]
        entries = {}
        for path, blob in below.items():
            name, inside, _ = path[len(start) :].partition("/")
            is_folder = {"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40}
            entries[name] = is_folder if inside else tree_entry(path, blob)
        return list(entries.values())

    def _bucket(self, bucket: str) -> None:
        self._need_user()
        if self.command == "GET" and bucket not in self.hub.jobs.buckets:
            raise Answer(404, {"error": "Bucket not found"})
        if not self.hub.jobs.may_make_buckets or not self._owns(bucket.split("/")[0]):
            raise Answer(403, {"error": "Missing permissions"})
        url = f"{self.hub.url()}/buckets/{bucket}"
        if bucket in self.hub.jobs.buckets:
            raise Answer(409, {"error": "It exists", "url": url})
        self.hub.jobs.buckets.add(bucket)
        raise Answer(200, {"url": url})

    def _collection(self, path: str, body: bytes) -> None:
        """Create one (a title that is there answers with its slug), show one, add to one."""
        self._need_user()
        asked = json.loads(body) if body else {}
        slug, _, what = path.rpartition("/")
        if not path:
            title, owner = asked["title"], asked["namespace"]
            if not self._owns(owner):
                raise Answer(403, {"error": "You may not write to this namespace"})
            slug = f"{owner}/{title.lower().replace(' ', '-')}-{len(self.hub.collections):04x}"
            there = [
                s for s, t in self.hub.titles.items() if (s.split("/")[0], t) == (owner, title)
            ]
            if there:
                raise Answer(409, {"error": "It exists", "slug": there[0]})
            self.hub.collections[slug], self.hub.titles[slug] = [], title
            raise Answer(200, self._about_collection(slug, bool(asked.get("private"))))
        if path in self.hub.collections:
            raise Answer(200, self._about_collection(path))
        items = self.hub.collections.get(slug)
        if what not in ("items", "item") or items is None:
            raise Answer(404, {"error": "Collection not found"})
        if not self._owns(slug.split("/")[0]):
            raise Answer(403, {"error": "You may not write to this collection"})
        if asked["item"] in items:
            raise Answer(409, {"error": "The item is in the collection already"})
        items.append(asked["item"])
        raise Answer(200, self._about_collection(slug))

    def _about_collection(self, slug: str, private: bool = False) -> dict[str, Any]:
        about: dict[str, Any] = {"title": self.hub.titles.get(slug, "t"), "position": 1}
        about |= {"owner": {"name": slug.split("/")[0]}, "private": private, "theme": "blue"}
        about |= {"upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        return {"slug": slug, "items": [], "description": "", **about}

    def _search(self, kind: str, query: dict[str, list[str]]) -> None:
        def value(name: str) -> str:
            return query.get(name, [""])[0]

        found = [
            self._info(repo, repo.head, False)
            for (repo_kind, _), repo in self.hub.repos.items()
            if repo_kind == kind
            and not repo.private
            and value("search").lower() in repo.id.lower()
            and value("pipeline_tag") in ("", repo.extra.get("pipeline_tag"))
        ]
        if value("sort"):
            found.sort(key=lambda info: -(info.get(value("sort")) or 0))
        raise Answer(200, found[: int(value("limit") or 1000)])

    def _info(self, repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
        siblings = []
        for path, blob in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": blob.n_bytes, "blobId": blob.git_oid}
            if blobs and blob.lfs:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.n_bytes, "pointerSize": 130}
            siblings.append(sibling)
        return {
            "_id": "0",
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit.sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "siblings": siblings,
            "tags": [],
            **repo.extra,
        }

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        if repo_id in self.hub.aliases:
            raise Answer(
                307, {}, Location=f"/{self.hub.aliases[repo_id]}/resolve/{revision}/{path}"
            )
        repo = self._repo(kind, repo_id)
        if repo.gated and self.user not in repo.granted and not self._owns(repo_id.split("/")[0]):
            message = f"Access to model {repo_id} is restricted."
            raise Answer(
                403 if self.user else 401,
                {"error": message},
                X_Error_Code="GatedRepo",
                X_Error_Message=message,
            )
        commit = self._commit_at(repo, revision)
        blob = commit.files.get(path)
        headers = {"X_Repo_Commit": commit.sha}
        if blob is None:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
        if blob.lfs and "cdn" in self.hub._servers:
            self.hub.lfs[blob.sha256] = blob.data
            raise Answer(
                302,
                {},
                Location=f"{self.hub.url('cdn')}/lfs/{blob.sha256}",
                X_Linked_ETag=f'"{blob.sha256}"',
                X_Linked_Size=str(blob.n_bytes),
                **headers,
            )
        self._file(blob.data, ETag=f'"{blob.etag}"', **headers)

    def _file(self, data: bytes, **headers: str) -> None:
        """Answer with a file, or with the range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            raise Answer(200, data, Accept_Ranges="bytes", **headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= len(data):
            raise Answer(416, {}, Content_Range=f"bytes */{len(data)}")
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        raise Answer(206, data[start:stop], **headers)

    def _create(self, asked: dict[str, Any]) -> None:
        self._need_user()
        namespace = asked.get("organization") or self.user
        repo_id, kind = f"{namespace}/{asked['name']}", asked.get("type") or "model"
        repo = Repo(repo_id, kind, private=asked.get("visibility") == "private")
        self._need_write(repo)
        url = f"{self.hub.url()}/{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            raise Answer(409, {"error": "You already created this repo", "url": url})
        repo.commit("initial commit", {".gitattributes": Blob(b"*.gguf filter=lfs\n", False)})
        self.hub.repos[kind, repo_id] = repo
        raise Answer(200, {"url": url, "name": repo_id, "id": "0"})

    def _validate_yaml(self, content: str) -> None:
        bad = content.startswith("---\n") and "license: [" in content
        errors = [{"message": '"license" must be a string'}] if bad else []
        raise Answer(400 if bad else 200, {"errors": errors, "warnings": []})

    def _upload_mode(self, commit: Commit, file: dict[str, Any]) -> dict[str, Any]:
        large = is_large(file["path"], file["size"])
        there = commit.files.get(file["path"])
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": there.etag if there else None,
        }

    def _lfs_action(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where to put an object; nothing to do when it is here already."""
        oid, n_bytes, part = asked["oid"], asked["size"], self.hub.part_bytes
        if oid in self.hub.lfs:
            return asked
        upload: dict[str, Any] = {"href": f"{self.hub.url()}/lfs-upload/{oid}?size={n_bytes}"}
        if part is not None and n_bytes > part:
            upload["href"] = f"{self.hub.url()}/lfs-complete/{oid}"
            numbers = range(1, -(-n_bytes // part) + 1)
            urls = {str(n): f"{self.hub.url()}/lfs-part/{oid}?part={n}" for n in numbers}
            upload["header"] = {"chunk_size": str(part), **urls}
        verify = {"href": f"{self.hub.url()}/lfs-verify"}
        return {**asked, "actions": {"upload": upload, "verify": verify}}

    def _lfs_storage(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        """The bucket behind the Hub: signed addresses, no tokens."""
        what, oid = parts[0], parts[-1]
        if what == "lfs":
            self._file(self.hub.lfs[oid], ETag=f'"{oid}"')
        if what == "lfs-verify":
            known = json.loads(body)["oid"] in self.hub.lfs
            raise Answer(200 if known else 422, {})
        if what == "lfs-part":
            number = int(query["part"][0])
            self.hub._parts.setdefault(oid, {})[number] = body
            raise Answer(200, b"", ETag=f'"part{number}"')
        if what == "lfs-complete":
            stored = self.hub._parts.pop(oid)
            body = b"".join(stored[part["partNumber"]] for part in json.loads(body)["parts"])
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, {"error": "sha256 does not match"})
        self.hub.lfs[oid] = body
        raise Answer(200, {})

    def _make_commit(self, repo: Repo, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs[branch]):
            raise Answer(412, {"error": "A commit has happened since. Please refresh and retry."})
        files = dict(self._commit_at(repo, branch).files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                files[value["path"]] = Blob(self.hub.lfs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(header["summary"], files, branch)
        url = f"{self.hub.url()}/{quote(repo.id)}/commit/{commit.sha}"
        raise Answer(200, {"success": True, "commitOid": commit.sha, "commitUrl": url})
