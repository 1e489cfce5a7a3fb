"""The answers: one method an operation of GraphQL, ``variables`` -> data."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import yaml

from tests.helpers.wandb_stub.state import ENTITY, State, global_id, now, page, short_id
from tests.helpers.wandb_stub.sweeps import commands

Variables = dict[str, Any]
Answer = dict[str, Any]


class Refused(Exception):
    """The server's answer is an error."""


class Operations:
    """Answers to the client, on a state; ``base`` is the server's own address, for uploads."""

    def __init__(self, state: State, base: str, text: str) -> None:
        self.state, self.base, self.text = state, base, text

    # who and what

    def Viewer(self, v: Variables) -> Answer:
        team = {"edges": [{"node": {"name": ENTITY}}]}
        user = dict(
            id=global_id("User", "1"),
            entity=ENTITY,
            username="user",
            name="user",
            email="user@example",
            admin=False,
        )
        return {
            "viewer": user
            | dict(
                deletedAt=None, flags="{}", teams=team, apiKeys={"edges": []}, defaultEntity={"name": ENTITY}
            )
        }

    GetViewer = GetDefaultEntity = ViewerQuery = Viewer

    def ServerInfo(self, v: Variables) -> Answer:
        return {"serverInfo": dict(cliVersionInfo={"max_cli_version": "9.9.9"}, latestLocalVersionInfo=None)}

    def ServerFeaturesQuery(self, v: Variables) -> Answer:
        features = ["ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE"]
        return {"serverInfo": {"features": [dict(name=name, isEnabled=True) for name in features]}}

    def OrgFeatureFlags(self, v: Variables) -> Answer:
        return {"organization": None}

    def OrganizationCoreWeaveOrganizationID(self, v: Variables) -> Answer:
        return {"entity": None}

    # writing runs

    def UpsertBucket(self, v: Variables) -> Answer:
        run, state = self.state.run_by_id(v["id"]) if v.get("id") else None, self.state
        key = (v.get("project") or "uncategorized", v.get("name") or short_id())
        inserted = run is None and key not in state.runs
        run = run or state.run(*key)
        names = dict(
            displayName="displayName",
            groupName="group",
            jobType="jobType",
            notes="notes",
            tags="tags",
            host="host",
        )
        for theirs, ours in (names | {"sweep": "sweepName"}).items():
            if v.get(theirs) is not None:
                run[ours] = v[theirs]
        if v.get("config"):
            run["config"] = json.loads(v["config"])
        if v.get("summaryMetrics"):
            run["summary"] = json.loads(v["summaryMetrics"])
        run["state"] = v.get("state") or ("running" if run["state"] == "pending" else run["state"])
        return {"upsertBucket": dict(bucket=state.run_node(run), inserted=inserted)}

    def RunResumeStatus(self, v: Variables) -> Answer:
        run = self.state.runs.get((v["project"], v["name"]))
        return {
            "model": self.state.project(v["project"]) | {"bucket": self.state.run_node(run) if run else None}
        }

    def RewindRun(self, v: Variables) -> Answer:
        """A preview at W&B, which is off for most: see ``State.rewinds``."""
        if not self.state.rewinds:
            raise Refused("rewinding is not enabled for this organization")
        run = self.state.runs[v["project"], v["runName"]]
        run["history"] = [row for row in run["history"] if row["_step"] <= v["metricValue"]]
        return {"rewindRun": {"rewoundRun": self.state.run_node(run)}}

    def RunStoppedStatus(self, v: Variables) -> Answer:
        run = self.state.runs.get((v["projectName"], v["runId"]))
        return {"project": {"run": {"stopped": bool(run and run["stopped"])}}}

    def CreateRunFiles(self, v: Variables) -> Answer:
        base = f"{self.base}/run_files/{v['project']}/{v['run']}/"
        files = [dict(name=name, uploadUrl=base + urllib.parse.quote(name)) for name in v["files"]]
        return {"createRunFiles": dict(runID=global_id("Run", v["run"]), uploadHeaders=[], files=files)}

    def MarkRunFilesUploaded(self, v: Variables) -> Answer:
        return {"markRunFilesUploaded": {"success": True}}

    def NotifyScriptableRunAlert(self, v: Variables) -> Answer:
        self.state.alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    # artifacts

    def CreateArtifact(self, v: Variables) -> Answer:
        given = v["input"]
        name = given.get("artifactCollectionName") or (given.get("artifactCollectionNames") or [""])[0]
        key = global_id("Artifact", given.get("digest") or short_id(), name)
        artifact = self.state.artifacts.setdefault(
            key,
            dict(
                id=key,
                state="PENDING",
                aliases=[],
                name=name,
                type=given.get("artifactTypeName"),
                run=given.get("runName"),
            )
            | dict(
                metadata=json.loads(given.get("metadata") or "{}"), client=given.get("clientID"), files=[]
            ),
        )
        for alias in [item["alias"] for item in given.get("aliases") or []]:
            for other in self.state.artifacts.values():
                if other["name"] == name and alias in other["aliases"]:
                    other["aliases"].remove(alias)
            artifact["aliases"].append(alias)
        sequence = dict(id=global_id("Sequence", name), latestArtifact=None)
        return {
            "createArtifact": {"artifact": dict(id=key, state=artifact["state"], artifactSequence=sequence)}
        }

    def upload(self, *path: str) -> dict[str, Any]:
        return dict(
            id="file", uploadUrl="/".join([self.base, *map(urllib.parse.quote, path)]), uploadHeaders=[]
        )

    def CreateArtifactManifest(self, v: Variables) -> Answer:
        file = self.upload("manifests", v["artifactID"], v["name"])
        return {
            "createArtifactManifest": {
                "artifactManifest": dict(id=global_id("Manifest", v["artifactID"]), file=file)
            }
        }

    def UpdateArtifactManifest(self, v: Variables) -> Answer:
        manifest = v.get("artifactManifestID") or ""
        return {
            "updateArtifactManifest": {
                "artifactManifest": dict(id=manifest, file=self.upload("manifests", manifest, "m.json"))
            }
        }

    def CreateArtifactFiles(self, v: Variables) -> Answer:
        nodes = []
        for spec in v.get("input", v)["artifactFiles"]:
            artifact, name = spec["artifactID"], spec["name"]
            self.state.artifacts[artifact]["files"].append(name)
            node = dict(
                name=name, displayName=name, storagePath=f"{artifact}/{name}", uploadMultipartUrls=None
            )
            nodes.append(
                self.upload("artifact_files", artifact, name) | node | {"artifact": {"id": artifact}}
            )
        return {"createArtifactFiles": {"files": page(nodes)}}

    def CommitArtifact(self, v: Variables) -> Answer:
        self.state.artifacts[v["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": dict(id=v["artifactID"], digest="digest")}}

    def ClientIDMapping(self, v: Variables) -> Answer:
        found = [
            artifact["id"]
            for artifact in self.state.artifacts.values()
            if artifact["client"] == v["clientID"]
        ]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    def ArtifactType(self, v: Variables) -> Answer:
        found = [a["type"] for a in self.state.artifacts.values() if a["name"] == v["name"].split(":")[0]]
        return {"project": {"artifact": {"artifactType": {"name": found[0]}} if found else None}}

    def ArtifactByID(self, v: Variables) -> Answer:
        return {"artifact": self.state.artifact_node(v["id"])}

    def FetchOrgInfoFromEntity(self, v: Variables) -> Answer:
        organization = dict(name="org", orgEntity={"name": "org-entity"})
        return {"entity": dict(organization=organization, user=None)}

    def LinkArtifact(self, v: Variables) -> Answer:
        given = v["input"]
        place = f"{given['entityName']}/{given['projectName']}/{given['artifactPortfolioName']}"
        self.state.linked.append((place, self.state.artifacts[given["artifactID"]]["metadata"].get("step")))
        collection = dict(__typename="ArtifactPortfolio", name=given["artifactPortfolioName"])
        collection |= dict(project=self.state.project(given["projectName"]))
        member = dict(__typename="ArtifactCollectionMembership", id=global_id("Member", "1"), versionIndex=0)
        member |= dict(createdAt=now(), aliases=[], artifactCollection=collection)
        member |= dict(artifact=self.state.artifact_node(given["artifactID"]))
        return {"result": dict(versionIndex=0, artifactMembership=member)}

    def UseArtifact(self, v: Variables) -> Answer:
        given = v["input"]
        self.state.used.append((given["runName"], self.state.artifacts[given["artifactID"]]["name"]))
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    # the public API

    def Runs(self, v: Variables) -> Answer:
        wanted = json.loads(v.get("filters") or "{}")
        of_project = [run for (project, _), run in self.state.runs.items() if project == v["project"]]
        nodes = [self.state.run_node(run) for run in of_project if fits(run, wanted)]
        return {"project": self.state.project(v["project"]) | dict(runCount=len(nodes), runs=page(nodes))}

    LightweightRuns = Runs

    def of_run(self, v: Variables) -> dict[str, Any]:
        return self.state.runs[v["project"], v.get("name") or v.get("run") or v.get("runName") or ""]

    def Run(self, v: Variables) -> Answer:
        return {"project": self.state.project(v["project"]) | {"run": self.state.run_node(self.of_run(v))}}

    LightRun = LightweightRun = GetRun = RunState = RunHistoryKeys = Run

    def GetProject(self, v: Variables) -> Answer:
        return {"project": self.state.project(v.get("name") or v["project"])}

    ProjectInternalId = GetProject

    def RunParquetHistory(self, v: Variables) -> Answer:
        history = {"parquetUrls": [], "liveData": self.of_run(v)["history"]}
        return {"project": {"run": {"parquetHistory": history}}}

    def HistoryPage(self, v: Variables) -> Answer:
        rows = [
            row for row in self.of_run(v)["history"] if v["minStep"] <= row.get("_step", 0) < v["maxStep"]
        ]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def SampledHistoryPage(self, v: Variables) -> Answer:
        spec = json.loads(v["spec"])
        rows = [
            {key: row[key] for key in spec["keys"]}
            for row in self.state.runs[v["project"], v["run"]]["history"]
            if spec["minStep"] <= row["_step"] <= spec["maxStep"] and all(key in row for key in spec["keys"])
        ]
        return {"project": {"run": {"sampledHistory": [rows]}}}

    def RunFiles(self, v: Variables) -> Answer:
        prefix = f"/run_files/{v['project']}/{v['name']}/"
        wanted = v.get("fileNames") or []
        nodes = [
            dict(
                id=path,
                name=path.removeprefix(prefix),
                url=self.base + path,
                directUrl=self.base + path,
                sizeBytes=len(content),
            )
            | dict(mimetype="", updatedAt=now(), md5="")
            for path, content in self.state.files.items()
            if path.startswith(prefix) and (not wanted or path.removeprefix(prefix) in wanted)
        ]
        run = self.of_run(v)
        return {
            "project": {
                "run": dict(fileCount=len(nodes), files=page(nodes), internalId=run["id"], id=run["id"])
            }
        }

    # sweeps

    def UpsertSweep(self, v: Variables) -> Answer:
        state = self.state
        sweep = next((s for s in state.sweeps.values() if v.get("id") in (s["id"], s["name"])), None)
        if sweep is None:
            name, settings = short_id(), yaml.safe_load(v["config"])
            project = v.get("projectName") or settings.get("project") or "uncategorized"
            sweep = dict(
                id=global_id("Sweep", "v1", name, project, ENTITY),
                name=name,
                project=project,
                state="PENDING",
            )
            sweep |= dict(
                displayName=settings.get("name") or name,
                settings=settings,
                config=v["config"],
                createdAt=now(),
            )
            state.sweeps[name] = sweep | dict(controller=None, scheduler=None)
            sweep = state.sweeps[name]
        sweep |= {key: v[key] for key in ("state", "controller", "scheduler") if v.get(key) is not None}
        return {"upsertSweep": dict(sweep=state.sweep_node(sweep), configValidationWarnings=[])}

    def GetSweep(self, v: Variables) -> Answer:
        sweep = self.state.sweeps.get(v.get("sweep") or v.get("name") or "")
        return {
            "project": self.state.project(v["project"])
            | {"sweep": self.state.sweep_node(sweep) if sweep else None}
        }

    SweepWithRuns = GetSweepState = GetSweep

    def CreateAgent(self, v: Variables) -> Answer:
        agent = short_id()
        self.state.agents[agent] = v["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def Heartbeat(self, v: Variables) -> Answer:
        sweep = self.state.sweeps[self.state.agents[v["id"]]]
        orders = commands(self.state, sweep, json.loads(v.get("runState") or "{}"))
        return {"agentHeartbeat": {"agent": {"id": v["id"]}, "commands": json.dumps(orders)}}


def fits(run: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a run fits a filter of the public API ($and, $or and equality)."""
    names = {"display_name": "displayName", "sweep": "sweepName"}
    for key, value in wanted.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(fits(run, part) for part in value):
                return False
        elif run.get(names.get(key, key)) != value:
            return False
    return True
