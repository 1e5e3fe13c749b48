"""Short documents as part of a question: their text is put before it, after a count of its tokens."""

import json
from dataclasses import dataclass

from entrypoints.web.client import ApiClient, TokenCount
from entrypoints.web.conversation import Attachment
from entrypoints.web.i18n import translate
from entrypoints.web.request_errors import ErrorMessage

LARGEST_SHARE = 0.75  # of the context length that a document may take


@dataclass(frozen=True)
class Document:
    """A document that the next question will contain; `count` is None if the server does not count tokens."""

    attachment: Attachment
    count: TokenCount | None

    def describe(self, language: str) -> str:
        """Its name and size."""
        name, count = self.attachment.name, self.count
        if count is None or count.limit is None:
            characters = len(self.attachment.text)
            return translate(language, "document_without_count", name=name, characters=f"{characters:,}")
        return translate(language, "document", name=name, tokens=f"{count.tokens:,}", limit=f"{count.limit:,}")


def picked_document(picked: str, api: ApiClient, model: str) -> Document | ErrorMessage | None:
    """The document that a visitor picked: JSON with its name and text, null if it is not text; None if cancelled."""
    if not picked:
        return None
    file = json.loads(picked)
    return read_document(str(file["name"]), file["text"], api, model)


def read_document(name: str, text: str | None, api: ApiClient, model: str) -> Document | ErrorMessage:
    """The document if it leaves room for a question and an answer."""
    if not text or not text.strip():
        return ErrorMessage("document_not_text", {"name": name})
    count = api.count_tokens(text, model)
    if count and count.limit is not None and count.tokens > count.limit * LARGEST_SHARE:
        return ErrorMessage("document_too_long", {"name": name, "tokens": count.tokens, "limit": count.limit})
    return Document(Attachment(name, text), count)
