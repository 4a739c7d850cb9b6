"""A published cache in Croissant 1.1, the vocabulary for data sets of MLCommons, with its responsible-AI fields:
https://docs.mlcommons.org/croissant/docs/croissant-spec.html.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kd_dist.cache.format import Column, Header
from kd_dist.cache.reader import Cache
from kd_dist.cache.statistics import describe_teacher, describe_views
from kd_dist.publish.card import ABOUT, NO_IMAGES, USE, limits, stated
from kd_dist.publish.parquet import columns_of, lengths_of, name_of

CR = "http://mlcommons.org/croissant/"
TERMS = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty"),
    *("fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
    *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator"),
    *("source", "subField", "transform"),
)
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": CR,
    "rai": f"{CR}RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in TERMS},
}
"""The standard one, which every Croissant file has."""

TYPES = {"S": "sc:Text", "i1": "cr:Int8", "i2": "cr:Int16", "i4": "cr:Int32", "i8": "cr:Int64"} | {
    **{"u1": "cr:UInt8", "u2": "cr:UInt16", "f2": "cr:Float16", "f4": "cr:Float32"}
}
DESCRIPTIONS = {
    "path": "the image's file, relative to the data folder",
    "bytes": "size of the image's file",
    "sha256": "SHA-256 of the image's file, hex",
    "label": "class of the image, a position in the list of classes; -1 where it is not known",
    "teacher": "row of the teachers in labels.json that gave the logits",
    "boxes": "crop of each view in pixels of the decoded image: top, left, height, width",
    "flips": "1 where a view is mirrored",
    "partner": "row of the image that a view is mixed with",
    "partner_view": "the view in which the partner is seen",
    "weight": "share of the image itself in a mixed view",
    "paste": "CutMix box of a mixed view as fractions of the side: top, left, bottom, right",
    "logits": "the teacher's raw logits of each view",
    "top_index": "classes of each view's largest logits",
    "top_logits": "each view's largest logits",
    "top_tail": "common logit of the other classes at the temperatures infinity, 8, 4, 3, 2, 1.5, 1.25, 1",
}


def croissant(cache: Cache, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The content of croissant.json; `document` is that of labels.json."""
    own = document["statement"]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": f"{ABOUT} Images: {cache.header.dataset}, {stated(own['source'])}. {NO_IMAGES}",
        "conformsTo": [f"{CR}1.1", f"{CR}RAI/1.0"],
        "license": stated(own["licence"]),
        "creator": {"@type": "sc:Person", "name": stated(own["creator"])},
        "citeAs": f"{name}, soft labels, SHA-256 of the cache {cache.digest}",
        "version": "1.0.0",
        "dateCreated": cache.header.created[:10],
        "datePublished": datetime.now(UTC).date().isoformat(),
        "keywords": ["knowledge distillation", "soft labels", "image classification"],
        "distribution": [_file(split, facts) for split, facts in document["splits"].items()],
        "recordSet": [_records(cache.header, split, facts) for split, facts in document["splits"].items()],
        **_responsible(cache, own),
    }


def _file(split: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": f"{split}.parquet",
        "name": f"{split}.parquet",
        "contentUrl": facts["file"],
        "contentSize": f"{facts['bytes']} B",
        "encodingFormat": "application/x-parquet",
        "sha256": facts["sha256"],
    }


def _records(header: Header, split: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    fields = [_field(column, header, split, facts["views"]) for column in columns_of(header)]
    images = f"{facts['images']} images in {facts['views']} views each"
    about = {"@type": "cr:RecordSet", "@id": split, "name": split, "description": f"{split}: {images}"}
    return {**about, "key": {"@id": f"{split}/path"}, "field": fields}


def _field(column: Column, header: Header, split: str, views: int) -> dict[str, Any]:
    name, lengths = name_of(column), lengths_of(column, header)
    text = name in ("path", "sha256")
    shape = ",".join(str(views if length < 0 else length) for length in lengths)
    return {
        "@type": "cr:Field",
        "@id": f"{split}/{name}",
        "name": name,
        "description": DESCRIPTIONS[name],
        "dataType": TYPES["S" if text else column.dtype.str[1:]],
        **({"isArray": True, "arrayShape": shape} if lengths else {}),
        "source": {"fileObject": {"@id": f"{split}.parquet"}, "extract": {"column": name}},
    }


def _responsible(cache: Cache, own: Mapping[str, Any]) -> dict[str, Any]:
    """The responsible-AI fields that apply to labels by a machine; those on people who label do not."""
    header, views = cache.header, cache.views
    return {
        "rai:dataCollection": f"Images: {header.dataset}; source: {stated(own['source'])}. {NO_IMAGES}",
        "rai:dataPreprocessingProtocol": [
            f"Views: {describe_views(header)}.",
            f"Rendered by {header.renderer} at {header.image_size} px.",
        ],
        "rai:machineAnnotationTools": [describe_teacher(row) for row in header.teachers],
        "rai:dataAnnotationProtocol": "Logits of the teachers in float16, computed once for each image and view.",
        "rai:annotationsPerItem": f"{views} (train), {cache.split('val').views} (val)",
        "rai:dataLimitations": limits(cache),
        "rai:dataBiases": "The labels carry the biases of the teachers and of the data that the teachers learned from.",
        "rai:dataUseCases": f"{USE} Intended use: {stated(own['intended_use'])}.",
        "rai:personalSensitiveInformation": f"{NO_IMAGES} File names are those of the image set.",
        "rai:dataReleaseMaintenancePlan": "Not stated.",
    }
