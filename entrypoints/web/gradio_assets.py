"""Style sheet and scripts of the Gradio page; only fonts of the visitor's system are used."""

from entrypoints.web.browser_script import BROWSER_SCRIPT
from entrypoints.web.message_rendering import WORD_JOINER

TEXT_FONTS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Noto Sans Mono CJK SC", "monospace"]
LATEX_DELIMITERS = [
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
# Darker than the theme's own: text needs a contrast of 4.5 to its background.
CONTRAST = {
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_title_text_color": "*primary_700",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "checkbox_label_background_fill_selected": "*primary_600",
}
CSS = """
#banner {border-left: 4px solid #b45309; background: #fef3c7; color: #78350f; padding: 6px 12px; border-radius: 6px}
#banner, #banner * {color: #78350f !important} /* also in dark mode */
#status {min-height: 1.4em; font-size: 13px}
#feedback_notice {font-size: 12px}
#top {align-items: center; flex-wrap: nowrap; flex-grow: 0}
#top h1 {margin: 0; white-space: nowrap; font-size: 20px}
#language label {padding: 6px 10px; white-space: nowrap}
#language label span {margin-left: 0}
#language input {position: absolute; opacity: 0}
#language label:has(input:focus-visible) {outline: 2px solid var(--color-accent)}
#language .wrap {flex-wrap: nowrap}
#input {flex-wrap: nowrap; gap: 8px; align-items: end; flex-grow: 0}
#conversations .wrap {flex-direction: column; max-height: 30vh; overflow-y: auto; flex-wrap: nowrap}
#conversations label {width: 100%; overflow: hidden}
#conversations label span {white-space: nowrap; overflow: hidden; text-overflow: ellipsis}
#theme label {white-space: nowrap}
/* in light colors these have the color of the page */
#question textarea, #chats .example {border: 1px solid var(--border-color-primary) !important; border-radius: 8px}
/* the page has the height of the screen, and the conversation gets what the other parts leave */
#chats {flex: 1 1 0; min-height: 180px; align-items: stretch}
#chats > * {height: 100%; min-height: 0}
/* a closed side bar is outside the screen: its fields are no stops of the Tab key */
.sidebar:not(.open) .sidebar-content {visibility: hidden}
/* each paragraph in the direction of its script */
.message :is(p, li, h1, h2, h3, h4, td, th, pre.typed) {unicode-bidi: plaintext; text-align: start}
.message .prose.chatbot.md {opacity: 1}
.message pre.typed {font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 0;
  background: none; border: none}
.message .card {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 4px 10px}
.message .card summary {cursor: pointer; font-weight: 600}
.message .card pre {white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0; background: none}
.message .failed_result {border-color: #b91c1c}
.message .failed_result summary, .message .error {color: var(--error-text-color)}
.dark .message :is(.failed_result summary, .error) {color: #fca5a5}
.message .actions {display: flex; flex-wrap: wrap; gap: 2px 4px; align-items: center; margin-top: 2px}
.message .actions > * {margin: 0 !important}
.message .act {font-size: 12px; padding: 2px 6px; border-radius: 6px; color: var(--body-text-color)}
.message .act:hover {background: var(--border-color-primary)}
.message .act:focus-visible {outline: 2px solid var(--color-accent)}
.message .act.pressed {background: var(--color-accent); color: white}
.message :is(.version, .caption) {font-size: 12px}
.message .code_wrap pre {padding-right: 44px} /* the copy button must not cover the text */
#chats .icon-button-wrapper.top-panel {display: none}
@media (max-width: 640px) {#attach {min-width: 64px !important}}
footer {display: none !important}
"""
# Copied text is the raw text: the word joiners of message_rendering.py are removed.
HEAD = (
    "<script>"
    + BROWSER_SCRIPT
    + """
document.addEventListener("copy", (event) => {
  const field = document.activeElement;
  const typed = field && field.selectionStart !== undefined && field.selectionStart !== field.selectionEnd;
  const text = typed ? field.value.slice(field.selectionStart, field.selectionEnd) : String(getSelection());
  if (text.includes("JOINER")) {
    event.clipboardData.setData("text/plain", text.replace(/(?<=[<&!])JOINER/g, ""));
    event.preventDefault();
  }
});
// When all events have ended, Gradio's client closes its stream. An event that joins the queue just before, such as
// Enter just after an answer, is not shown until another event opens a stream.
const request = window.fetch;
let streams = 0, joined = false; // whether an event joined beside an open stream
window.fetch = async (resource, options) => {
  const url = String(resource.url || resource);
  if (url.includes("/queue/data?")) {
    streams++;
    resource.signal?.addEventListener("abort", () => {
      streams--;
      if (joined) page.wake();
      joined = false;
    });
  }
  const response = await request(resource, options);
  if (url.includes("/queue/join?")) joined ||= streams > 0;
  return response;
};
</script>
""".replace("JOINER", WORD_JOINER)
)
# In the component `action`: a click on a button of a message becomes an event of the component.
ACTION_SCRIPT = """
page.wake = () => trigger("tick");  // an event without effect
document.addEventListener("click", (event) => {
  const button = event.target.closest("#chats .message button.act");
  if (!button) return;
  page.clicked = {name: button.name, value: button.value};
  trigger("click", page.clicked);
});
"""
OPEN_SIDEBAR_ON_WIDE_SCREENS = "() => ({__type__: 'update', open: innerWidth >= 1000})"
READ_BROWSER = "(_, ...rest) => [page.read(), ...rest]"
WRITE_BROWSER = "(changes) => page.write(changes)"
SAVE_SETTINGS = "(...values) => page.saveSettings(values)"
APPLY_LANGUAGE = "(language) => page.setLanguage(language)"
APPLY_THEME = "(theme) => page.setTheme(theme)"
DOWNLOAD = "(file) => page.download(file)"
COPY = "(text) => page.copy(text)"
PICK_TEXT = "async (_, ...rest) => [await page.pickText('.txt,.md,.csv,.json,.jsonl,.log,.py,text/*'), ...rest]"
PICK_JSON = "async (_, ...rest) => [await page.pickText('.json'), ...rest]"
FOCUS_QUESTION = "() => page.focus('#question textarea')"
FOCUS_AFTER_ACTION = "() => page.focusAfterAction()"
