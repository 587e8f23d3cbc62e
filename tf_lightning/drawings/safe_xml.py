"""Parse XML from anywhere: it may declare no entities, which could expand without limit."""

import xml.etree.ElementTree as ET
from xml.parsers import expat

from tf_lightning.data.documents import BadSample


def parse_xml(content: bytes) -> ET.Element:
    """Return the root element. No file that the XML names is opened.

    Raises:
        BadSample: the content is not well-formed XML, or it declares an entity.
    """
    checker = expat.ParserCreate()
    checker.EntityDeclHandler = _refuse_entity
    try:
        checker.Parse(content, True)
        return ET.fromstring(content)
    except (ET.ParseError, expat.ExpatError, ValueError, LookupError) as error:
        raise BadSample("XML that is not well-formed") from error


def _refuse_entity(*declaration) -> None:
    raise BadSample("XML that declares entities")
