"""The CycloneDX bill of materials of a checkpoint (ML-BOM 1.6): the model, its source, its data and the tools.

All of it is from `fourge.json` and the front matter of the card, so equal files give equal bytes: the serial number
follows from the content, and there is no time of writing.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from fourge.errors import InputError

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

NEEDS = "pip install 'fourge[sbom]'"


def bill_of_materials(name: str, provenance: Mapping[str, Any], record: bytes, licence: str | None) -> str:
    """The JSON text for the model `name`; `record` is `fourge.json` as it lies there and `provenance` its content."""
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType, Pedigree
        from cyclonedx.model.tool import ToolRepository
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError as error:
        raise InputError(f"fourge sbom needs a library; {NEEDS}") from error

    versions, settings = provenance["versions"], provenance["settings"]
    origin = _origin(provenance["source"], licence)
    model = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        bom_ref="model",
        version=hashlib.sha256(record).hexdigest()[:16],
        description=f"{origin.name} quantized to {settings['scheme']}",
        hashes=[_sha256(hashlib.sha256(record).hexdigest())],
        licenses=_licences(licence),
        pedigree=Pedigree(ancestors=[origin]),
        components=_files(provenance["output"]["files"], "output"),
        properties=_properties({"hashes": "SHA-256 of fourge.json, which names every file's", **settings}),
    )
    tools = [
        Component(
            type=ComponentType.APPLICATION if tool == "fourge" else ComponentType.LIBRARY, name=tool, version=version
        )
        for tool, version in sorted(versions.items())
    ]
    data = _data_sets(provenance["data"], settings)
    bom = Bom(
        components=data,
        serial_number=uuid5(NAMESPACE_URL, f"{name}/{hashlib.sha256(record).hexdigest()}"),
        metadata=BomMetaData(component=model, tools=ToolRepository(components=tools)),
    )
    bom.register_dependency(model, data)
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    content = json.loads(text)
    del content["metadata"]["timestamp"]
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _origin(source: Mapping[str, Any], licence: str | None) -> "Component":
    """The model that this one was made from: its hub repository and commit, or the name of its folder."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    repository, revision = source["repository"], source["revision"]
    purl = None
    if repository is not None:
        organization, _, short = repository.rpartition("/")
        purl = PackageURL(type="huggingface", namespace=organization or None, name=short, version=revision)
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=repository or Path(source["name"]).name,
        bom_ref="source",
        version=revision,
        licenses=_licences(licence),
        purl=purl,
        components=_files(source["files"], "source"),
    )


def _data_sets(data: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> "list[Component]":
    """What was calibrated, chosen and measured on: a component each, its hash that of the token ids."""
    from cyclonedx.model.component import Component, ComponentType

    components = []
    for role in ("calibration", "validation", "probe"):
        entry = (data or {}).get(role)
        if not entry or not entry["sequences"]:
            continue
        name = settings["probe"] if role == "probe" and settings["probe"] else settings["calibration"]
        origin = entry["origin"]
        components.append(
            Component(
                type=ComponentType.DATA,
                name=origin.get("dataset") or Path(name).name,
                bom_ref=f"data:{role}",
                version=origin.get("revision"),
                description=f"{role}: {entry['sequences']} sequences, {entry['tokens']} tokens",
                hashes=[_sha256(entry["sha256"])],
                properties=_properties({"hashes": "SHA-256 of the token ids", **origin}),
            )
        )
    return components


def _files(files: Mapping[str, Mapping[str, Any]], side: str) -> "list[Component]":
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            type=ComponentType.FILE,
            name=name,
            bom_ref=f"{side}:{name}",
            hashes=[_sha256(entry["sha256"])],
            properties=_properties({"bytes": entry["size"]}),
        )
        for name, entry in sorted(files.items())
    ]


def _sha256(digest: str) -> "HashType":
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _licences(licence: str | None) -> "list[License]":
    """The card's licence by its SPDX identifier where it is one, else by the name that the card gives it."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [] if licence is None else [LicenseFactory().make_from_string(licence)]


def _properties(values: Mapping[str, Any]) -> "list[Property]":
    """Our own names under `fourge:`, values as JSON where they are not text; what was typed as a path stays out."""
    from cyclonedx.model import Property

    return [
        Property(name=f"fourge:{key}", value=value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in sorted(values.items())
        if key not in ("model", "calibration", "probe")
    ]
