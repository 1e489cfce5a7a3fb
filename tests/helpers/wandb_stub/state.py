"""The state of the stub, and its form in an answer."""

from __future__ import annotations

import base64
import collections
import json
import secrets
import threading
import time
from typing import Any

ENTITY = "team"


def short_id() -> str:
    return secrets.token_hex(4)


def global_id(kind: str, *parts: str) -> str:
    return base64.b64encode(":".join([kind, *parts]).encode()).decode()


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def page(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """A connection with all its nodes on one page."""
    return {
        "totalCount": len(nodes),
        "edges": [{"node": node, "cursor": str(i)} for i, node in enumerate(nodes)],
        "pageInfo": {"endCursor": None, "hasNextPage": False},
    }


class State:
    """Runs, sweeps, agents, files, artifacts and alerts."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.runs: dict[tuple[str, str], dict[str, Any]] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.used: list[tuple[str, str]] = []  # (run, artifact) of every use
        self.linked: list[tuple[str, int | None]] = []  # (place in the registry, step) of every linked model
        self.rewinds = True  # whether runs can be rewound
        self.alerts: list[dict[str, Any]] = []
        self.operations: collections.Counter[str] = collections.Counter()
        self.unknown: list[str] = []

    def run(self, project: str, name: str) -> dict[str, Any]:
        """The run, made when it is not there."""
        if (project, name) not in self.runs:
            self.runs[project, name] = dict(
                id=global_id("Run", "v1", name, project, ENTITY),
                name=name,
                displayName=name,
                project=project,
                config={},
                summary={},
                history=[],
                events=[],
                log=[],
                state="running",
                tags=[],
                group=None,
                jobType=None,
                notes="",
                sweepName=None,
                stopped=False,
                preempting=False,
                exitcode=None,
                createdAt=now(),
                heartbeatAt=now(),
                host="",
                args=None,
            )
        return self.runs[project, name]

    def run_by_id(self, wanted: str) -> dict[str, Any] | None:
        return next((run for run in self.runs.values() if run["id"] == wanted), None)

    def only_run(self) -> dict[str, Any]:
        """The one run that there is."""
        (run,) = self.runs.values()
        return run

    def runs_of_sweep(self, sweep: str) -> list[dict[str, Any]]:
        return [run for run in self.runs.values() if run["sweepName"] == sweep]

    def project(self, name: str) -> dict[str, Any]:
        return dict(
            id=global_id("Project", "v1", name, ENTITY),
            internalId=global_id("ProjectInternalId", "1"),
            name=name,
            entityName=ENTITY,
            entity=dict(id=global_id("Entity", "1"), name=ENTITY),
            createdAt=now(),
            isBenchmark=False,
            readOnly=False,
        )

    def artifact_node(self, key: str) -> dict[str, Any]:
        """An artifact as GraphQL shows it."""
        artifact = self.artifacts[key]
        collection = dict(__typename="ArtifactSequence", name=artifact["name"], project=self.project("p"))
        return dict(
            __typename="Artifact",
            id=key,
            artifactSequence=collection,
            versionIndex=0,
            artifactType={"name": artifact["type"]},
            description=None,
            metadata=json.dumps(artifact["metadata"]),
            ttlDurationSeconds=-2,
            ttlIsInherited=True,
            tags=[],
            historyStep=None,
            state=artifact["state"],
            size=1,
            digest="digest",
            commitHash="commit",
            fileCount=len(artifact["files"]),
            createdAt=now(),
            updatedAt=now(),
            aliases=[],
        )

    def run_node(self, run: dict[str, Any]) -> dict[str, Any]:
        """A run as GraphQL shows it."""
        history = run["history"]
        return run | dict(
            __typename="Run",
            storageId=run["id"],
            projectId="1",
            internalId=global_id("RunInternalId", run["name"]),
            description=None,
            config=json.dumps(run["config"]),
            summaryMetrics=json.dumps(run["summary"]),
            sweep=None,
            groupName=run["group"],
            updatedAt=run["heartbeatAt"],
            commit=None,
            readOnly=False,
            user=dict(name="user", username="user", id=global_id("User", "1")),
            project=self.project(run["project"]),
            historyLineCount=len(history),
            logLineCount=len(run["log"]),
            eventsLineCount=len(run["events"]),
            historyTail=json.dumps([json.dumps(row) for row in history[-1:]]),
            eventsTail=json.dumps([json.dumps(row) for row in run["events"][-1:]]),
            wandbConfig=json.dumps({"t": 1}),
            historyKeys=history_keys(history),
            lastHistoryStep=history[-1].get("_step", -1) if history else -1,
            systemMetrics="{}",
            shouldStop=run["stopped"],
            failed=run["state"] == "failed",
            running=run["state"] == "running",
            runInfo=None,
            agent=None,
            outputArtifacts=None,
        )

    def sweep_node(self, sweep: dict[str, Any]) -> dict[str, Any]:
        """A sweep as GraphQL shows it."""
        nodes = [
            self.run_node(run) | {"sampledHistory": [run["history"]]}
            for run in self.runs_of_sweep(sweep["name"])
        ]
        return {key: value for key, value in sweep.items() if key != "settings"} | dict(
            method=sweep["settings"].get("method"),
            description=None,
            heartbeatAt=now(),
            updatedAt=now(),
            earlyStopJobRunning=False,
            bestLoss=None,
            runCount=len(nodes),
            runCountExpected=None,
            priorRuns=None,
            runs=page(nodes),
            project=self.project(sweep["project"]),
        )


def history_keys(history: list[dict[str, Any]]) -> dict[str, Any]:
    """W&B's description of the keys of a history."""
    keys: dict[str, Any] = {}
    for row in history:
        for key, value in row.items():
            kind = "number" if isinstance(value, int | float) else "string"
            entry = keys.setdefault(
                key, {"typeCounts": [{"type": kind, "count": 0}], "monotonic": key == "_step"}
            )
            entry["typeCounts"][0]["count"] += 1
            entry["previousValue"] = value
    return {"lastStep": history[-1].get("_step", -1) if history else -1, "sets": [], "keys": keys}
