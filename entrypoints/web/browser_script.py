"""The script that both chat pages run in the browser: what a framework has no component for.

Conversations and settings are in the local storage of the browser, one entry for each conversation, so that two tabs do
not overwrite each other's. The name of an entry contains the path of the page: two pages of one host are separate.
"""

BROWSER_SCRIPT = """
const page = {
  prefix: "glm-chat:" + location.pathname + ":",
  clicked: null,
  names() {
    return Object.keys(localStorage).filter((name) => name.startsWith(page.prefix + "c:"));
  },
  read() {
    let conversations = [], settings = null, current = null;
    try {
      current = sessionStorage.getItem(page.prefix + "current");
      conversations = page.names().map((name) => localStorage.getItem(name));
      settings = localStorage.getItem(page.prefix + "settings");
    } catch (error) { console.warn(error); }
    return JSON.stringify({conversations: JSON.stringify(conversations), settings, current});
  },
  write(text) {
    if (!text) return;
    const changes = JSON.parse(text);
    try {
      sessionStorage.setItem(page.prefix + "current", changes.current);  // a reload shows it again
      for (const id of changes.remove) localStorage.removeItem(page.prefix + "c:" + id);
      for (const [id, value] of Object.entries(changes.put)) page.put(page.prefix + "c:" + id, value);
    } catch (error) { console.warn(error); }
  },
  put(name, value) {
    const age = (other) => { try { return JSON.parse(localStorage.getItem(other)).updated; } catch { return 0; } };
    for (;;) {
      try {
        localStorage.setItem(name, value);
        return;
      } catch (error) {  // the storage is full: the oldest conversation goes
        const others = page.names().filter((other) => other !== name).sort((a, b) => age(a) - age(b));
        if (!others.length) throw error;
        localStorage.removeItem(others[0]);
      }
    }
  },
  saveSettings(values) {
    try { localStorage.setItem(page.prefix + "settings", JSON.stringify(values)); }
    catch (error) { console.warn(error); }
  },
  setLanguage(language) {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  },
  setTheme(theme) {
    const dark = theme === "dark" || (theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.body.classList.toggle("dark", dark);
  },
  download(file) {
    if (!file || !file.name) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.text], {type: file.type}));
    link.download = file.name;
    link.click();
    URL.revokeObjectURL(link.href);
  },
  async copy(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const field = document.createElement("textarea");  // without TLS browsers offer no clipboard
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  },
  pickText(accept) {
    return new Promise((resolve) => {
      const field = document.createElement("input");
      field.type = "file";
      field.accept = accept;
      field.addEventListener("cancel", () => resolve(""));
      field.addEventListener("change", async () => {
        const file = field.files[0];
        const bytes = file && file.size <= 4e6 ? new Uint8Array(await file.arrayBuffer()) : null;
        let text = null;
        try { text = bytes && new TextDecoder("utf-8", {fatal: true}).decode(bytes); } catch { text = null; }
        resolve(file ? JSON.stringify({name: file.name, text}) : "");
      });
      field.click();
    });
  },
  focus(selector) {
    const field = document.querySelector(selector);
    if (field) field.focus({preventScroll: true});
  },
  focusAfterAction() {
    const edit = document.querySelector("#edit_text textarea");
    if (edit && edit.offsetParent) return edit.focus();
    const {name, value} = page.clicked || {};
    const same = document.querySelector(`#chats button.act[name="${name}"][value="${value}"]`);
    const confirm = document.querySelector("#chats button.act[name=cancel]");
    (confirm || same || document.querySelector("#question textarea"))?.focus({preventScroll: true});
  },
};
window.page = page;
"""
