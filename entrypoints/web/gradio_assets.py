"""Style and scripts of the Gradio page; all fonts are the visitor's own."""

from entrypoints.web.display import JOINER

FONTS = ["system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Noto Sans Mono CJK SC", "monospace"]
DELIMITERS = [
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
CSS = """
#banner {border-left: 4px solid #d97706; background: #fef3c7; color: #78350f; padding: 8px 12px; border-radius: 6px}
#status {min-height: 1.4em; opacity: .75; font-size: 13px}
#actions button {min-width: 84px}
#top {align-items: center; flex-wrap: nowrap}
#top h2 {margin: 0; white-space: nowrap}
#language label {padding: 6px 10px}
#language label span {margin-left: 0}
#language input {position: absolute; opacity: 0}
#language .wrap {flex-wrap: nowrap}
#actions {gap: 8px}
@media (max-width: 640px) {#top h2 {font-size: 16px}}
footer {display: none !important}
"""
# Copying gives back what was said: the joiners of display.py go.
HEAD = """
<style>
  /* not in CSS: what Gradio makes of :root there no longer counts within @media */
  :root {--chat-height: max(200px, calc(100dvh - 230px))}
  @media (max-width: 640px) {:root {--chat-height: max(200px, calc(100dvh - 365px))}}
</style>
<script>
{
  const raw = (text) => text.replace(/(?<=[<&!])JOINER/g, "");
  const clipboard = navigator.clipboard;
  if (clipboard) {
    const write = clipboard.writeText.bind(clipboard);
    clipboard.writeText = (text) => write(raw(text));
  }
  document.addEventListener("copy", (event) => {
    const field = document.activeElement;
    const typed = field && field.selectionStart !== undefined && field.selectionStart !== field.selectionEnd;
    const text = typed ? field.value.slice(field.selectionStart, field.selectionEnd) : String(getSelection());
    if (text.includes("JOINER")) {
      event.clipboardData.setData("text/plain", raw(text));
      event.preventDefault();
    }
  });
}
</script>
""".replace("JOINER", JOINER)
OPEN_WHERE_WIDE = "() => ({__type__: 'update', open: innerWidth >= 1000})"
DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/jsonl"}));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}"""
