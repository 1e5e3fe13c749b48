"""Users of the Gradio page: who opened a tab, and events that are refused because someone else has signed in since."""

import html
from typing import Any

import gradio as gr

from entrypoints.web.i18n import negotiate_language, translate
from entrypoints.web.session import ChatSession
from entrypoints.web.users import PageUser
from entrypoints.web.visitors import is_of_another_user

QUEUE_POLL_SECONDS = 0.02  # Gradio looks for events every millisecond: 9 % of a CPU while nobody uses the page


class VisitorSession(ChatSession):
    """gr.State copies its value for each visitor: a plain copy would give the conversations of all the same id."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> "VisitorSession":
        return VisitorSession()


class VisitorBlocks(gr.Blocks):
    """gr.Blocks whose events are refused if their tab belongs to another user, and whose queue lets the CPU rest."""

    def queue(self, *values: Any, **options: Any) -> "VisitorBlocks":
        """As in gr.Blocks, which calls it for a new page."""
        super().queue(*values, **options)
        self._queue.sleep_when_free = QUEUE_POLL_SECONDS
        return self

    async def process_api(
        self, block_fn: Any, inputs: Any, state: Any = None, request: Any = None, *others: Any, **options: Any
    ) -> dict[str, Any]:
        """Process an event. Raises gr.Error: it is refused."""
        sessions = list(state.state_data.values()) if state else []
        if request and any(isinstance(each, ChatSession) and _is_refused(each, request) for each in sessions):
            raise gr.Error(translate(negotiate_language(request.headers.get("accept-language")), "other_user"))
        return await super().process_api(block_fn, inputs, state, request, *others, **options)


def _is_refused(session: ChatSession, request: gr.Request) -> bool:
    return is_of_another_user(session, request.headers)


def user_link(user: PageUser | None, language: str) -> dict[str, Any]:
    """The name of the signed-in user and the link to sign out."""
    text = translate(language, "sign_out")
    link = f'{html.escape(user.name)} · <a href="sign-out" target="_self">{text}</a>' if user else ""
    update: dict[str, Any] = gr.update(value=link, visible=user is not None)
    return update
