"""Print a software bill of materials (CycloneDX 1.6) of this Python environment: packaging/sbom.py."""

import json
from importlib import metadata
from typing import Any


def bill() -> dict[str, Any]:
    """Return the bill: hookferry, and every installed distribution as a component, by name."""
    components = sorted(map(_component, metadata.distributions()), key=lambda each: each["name"])
    [main] = [each for each in components if each["name"] == "hookferry"]
    others = [each for each in components if each is not main]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**main, "type": "application"}},
        "components": others,
        "dependencies": [{"ref": main["bom-ref"], "dependsOn": [each["bom-ref"] for each in others]}],
    }


def _component(distribution: metadata.Distribution) -> dict[str, Any]:
    name, version = distribution.metadata["Name"].lower().replace("_", "-"), distribution.version
    purl = f"pkg:pypi/{name}@{version}"
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    if expression := distribution.metadata.get("License-Expression"):
        component["licenses"] = [{"expression": expression}]
    elif license_ := distribution.metadata.get("License"):
        component["licenses"] = [{"license": {"name": license_.splitlines()[0]}}]
    return component


if __name__ == "__main__":
    print(json.dumps(bill(), indent=1, sort_keys=True))
