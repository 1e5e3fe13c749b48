"""Texts of the pages in Chinese and English."""

from entrypoints.web.training_runs.texts import TRAINING_TEXTS

LANGUAGES = {"zh": "中文", "en": "English"}
TEXTS = {
    "title": ("ChatGLM3", "ChatGLM3"),
    "model": ("模型或适配器", "Model or adapter"),
    "adapter_of": ("{name}（{parent} 的适配器）", "{name} (adapter of {parent})"),
    "refresh": ("刷新模型列表", "Refresh models"),
    "system": ("系统提示词", "System prompt"),
    "system_hint": ("可选，置于对话开头", "Optional, placed before the conversation"),
    "max_tokens": ("最大生成长度", "Max tokens"),
    "temperature": ("温度", "Temperature"),
    "top_p": ("top_p", "top_p"),
    "tool_mode": ("工具调用", "Tool calling"),
    "tools": ("工具定义（JSON 数组）", "Tools (JSON array)"),
    "key": ("API 密钥（仅用于当前页面）", "API key (for this page only)"),
    "question": ("输入问题，按回车发送", "Type a question and press Enter"),
    "question_label": ("问题", "Question"),
    "tool_result_hint": ("输入 {name} 的返回结果，按回车发送", "Type the result of {name} and press Enter"),
    "send": ("发送", "Send"),
    "stop": ("停止", "Stop"),
    "regenerate": ("重新生成", "Regenerate"),
    "edit": ("修改", "Edit"),
    "retry": ("重试", "Retry"),
    "continue": ("继续生成", "Continue"),
    "continue_request": (
        "请从中断处继续，不要重复已写的内容。",
        "Continue exactly where you stopped, without repetition.",
    ),
    "branch": ("另开分支", "Branch"),
    "delete": ("删除", "Delete"),
    "confirm_delete": ("确认删除这条及之后的消息", "Delete this and all later messages"),
    "cancel": ("取消", "Cancel"),
    "save": ("保存", "Save"),
    "edit_label": ("修改消息", "Edit message"),
    "like": ("赞", "Good answer"),
    "dislike": ("踩", "Bad answer"),
    "correct": ("修正", "Correct"),
    "corrected": ("修正后的回答：", "Corrected answer:"),
    "feedback_notice": (
        "评价和修正会连同此前的对话保存到本页面的服务器，用于改进模型",
        "To improve the model, ratings and corrections are saved on the server of this page with the conversation"
        " before them",
    ),
    "previous_version": ("上一个版本", "Previous version"),
    "next_version": ("下一个版本", "Next version"),
    "cancel_edit": ("取消", "Cancel"),
    "search": ("搜索对话", "Search conversations"),
    "conversations": ("对话", "Conversations"),
    "manage": ("管理对话", "Manage conversations"),
    "settings": ("设置", "Settings"),
    "rename": ("标题（按回车保存）", "Title (press Enter to save)"),
    "export_markdown": ("导出 Markdown", "Export Markdown"),
    "export_json": ("导出 JSON", "Export JSON"),
    "export_all": ("全部导出", "Export all"),
    "import_file": ("导入", "Import"),
    "delete_conversation": ("删除对话", "Delete conversation"),
    "confirm_delete_conversation": ("确认删除", "Confirm deletion"),
    "kept_browser": ("对话保存在此浏览器中", "Conversations are stored in this browser"),
    "kept_server": (
        "对话保存在本页面的服务器上，只有您可以在页面中看到",
        "Conversations are stored on the server of this page; on the page, only you see them",
    ),
    "kept_off": ("不保存对话，关闭页面后即消失", "Conversations are not stored and end with this page"),
    "not_stored": (
        "服务器未能保存这次改动，请联系页面的管理员",
        "The server could not store this change; ask the operator of the page",
    ),
    "other_user": ("已有其他用户登录，请重新加载页面", "Another user has signed in; reload this page"),
    "role_user": ("用户", "User"),
    "role_assistant": ("助手", "Assistant"),
    "role_tool": ("工具", "Tool"),
    "compare_model": ("并排比较的模型", "Second model, side by side"),
    "no_comparison": ("不比较", "None"),
    "saved_prompts": ("已保存的系统提示词", "Saved system prompts"),
    "save_prompt": ("保存提示词", "Save prompt"),
    "remove_prompt": ("删除提示词", "Delete prompt"),
    "theme": ("外观", "Theme"),
    "theme_system": ("跟随系统", "System"),
    "theme_light": ("浅色", "Light"),
    "theme_dark": ("深色", "Dark"),
    "example_1": ("用三句话介绍你自己", "Introduce yourself in three sentences"),
    "example_2": ("类型#裤*材质#牛仔*风格#简约*版型#直筒", "Write a product text: trousers, denim, plain, straight"),
    "example_3": ("写一封请假一天的邮件", "Write an e-mail that asks for a day off"),
    "example_4": ("用 Python 写一个快速排序", "Write quicksort in Python"),
    "attach": ("添加文档", "Add document"),
    "remove_document": ("移除", "Remove"),
    "document": (
        "{name}：{tokens} 个 token，上下文长度 {limit}",
        "{name}: {tokens} tokens of a context length of {limit}",
    ),
    "document_without_count": ("{name}：{characters} 个字符", "{name}: {characters} characters"),
    "document_too_long": (
        "{name} 有 {tokens} 个 token，超过上下文长度 {limit} 的四分之三，请缩短文档",
        "{name} has {tokens} tokens, more than three quarters of the context length of {limit}. Shorten it.",
    ),
    "document_not_text": ("{name} 不是 4 MB 以内的 UTF-8 文本", "{name} is not a UTF-8 text of at most 4 MB"),
    "clear": ("新对话", "New chat"),
    "export": ("导出为训练数据", "Export as training data"),
    "copy": ("复制", "Copy"),
    "empty": ("你好！有什么可以帮你的吗？", "Hello! How can I help you?"),
    "tool_call": ("调用工具 {name}", "Tool call: {name}"),
    "tool_result": ("工具返回结果", "Tool result"),
    "tool_error": ("工具出错", "Tool error"),
    "waiting": ("正在等待模型响应… {seconds} 秒", "Waiting for the model… {seconds} s"),
    "stats": (
        "回答 {answer} 个 token，提示词 {prompt} 个 token；用时 {seconds} 秒，{rate} token/秒",
        "{answer} answer tokens, {prompt} prompt tokens; {seconds} s, {rate} tokens/s",
    ),
    "stats_stopped": (
        "已停止：约 {answer} 个 token，用时 {seconds} 秒，{rate} token/秒",
        "Stopped: about {answer} tokens in {seconds} s, {rate} tokens/s",
    ),
    "truncated": ("回答已达最大生成长度，被截断", "The answer was truncated at max tokens"),
    "dropped": (
        "超出上下文长度，已省略最早的 {count} 轮对话",
        "Context length exceeded: {count} oldest rounds omitted",
    ),
    "unreachable": (
        "无法连接模型服务 {url}。服务恢复后，请点击“重试”。",
        "Cannot connect to the API at {url}. Click Retry when it is available again.",
    ),
    "stopped_early": ("已在回答开始前停止", "Stopped before the answer began"),
    "empty_answer": ("模型给出了空回答，请重新生成", "The model gave an empty answer. Click Regenerate."),
    "busy": ("模型服务繁忙，请在 {seconds} 秒后重试", "The API is busy. Try again in {seconds} seconds."),
    "needs_key": ("模型服务需要 API 密钥，请在设置中填写", "The API requires a key. Enter it in the settings."),
    "wrong_key": (
        "API 密钥无效或无权访问，请在设置中检查密钥",
        "The API rejects this key: it is wrong or has no access. Check it in the settings.",
    ),
    "unknown_model": (
        "模型服务没有所选的模型，请刷新模型列表",
        "The API does not have the selected model. Refresh the models.",
    ),
    "loading": ("模型正在加载，请在 {seconds} 秒后重试", "The model is loading. Try again in {seconds} seconds."),
    "too_long": (
        "问题超出模型的上下文长度，请缩短问题（服务器原文：{detail}）",
        "The question exceeds the model's context window: {detail}",
    ),
    "too_long_by": (
        "提示词有 {tokens} 个 token，超出模型的上下文长度 {limit}，请缩短问题",
        "The prompt has {tokens} tokens and exceeds the context length of {limit}. Shorten the question.",
    ),
    "rejected": ("模型服务拒绝了请求（服务器原文：{detail}）", "The API rejected the request: {detail}"),
    "failed": ("模型服务出错（服务器原文：{detail}）", "The API failed: {detail}"),
    "tools_not_json": (
        "工具定义第 {line} 行第 {column} 列不是有效的 JSON",
        "Invalid tool definition: not JSON at line {line}, column {column}",
    ),
    "tools_not_a_list": ("工具定义应为 JSON 数组：{form}", "Invalid tool definition: expected a JSON array {form}"),
    "tools_bad_field": (
        "工具定义无效：第 {number} 个工具的 {field} 缺失或格式不正确",
        "Invalid tool definition: {field} of tool {number} is missing or has a wrong form",
    ),
    "bad_import": (
        "文件不是从本页面导出的对话（{field}）",
        "The file is not a conversation that this page exported ({field})",
    ),
    "import_too_large": (
        "文件过大，最多 {limit} 个字符",
        "The file is too large: the limit is {limit} characters",
    ),
    "nothing_to_export": (
        "暂无可导出的对话（不含工具调用的轮次）",
        "Nothing to export yet (rounds with tool calls are omitted)",
    ),
    "sign_in": ("登录", "Sign in"),
    "sign_out": ("退出登录", "Sign out"),
    "user_name": ("用户名", "User name"),
    "password": ("密码", "Password"),
    "wrong_password": ("用户名或密码不正确", "Wrong user name or password"),
    "password_required": ("请输入密码", "password required"),
    "too_many_guesses": (
        "密码错误次数过多，请在 {seconds} 秒后重试",
        "too many wrong passwords; try again in {seconds} seconds",
    ),
    "host_not_allowed": (
        "不允许使用主机名 {host} 访问：请用 --allowed-host 添加该名称，或设置 PAGE_PASSWORD",
        "the host {host} is not allowed; add it with --allowed-host, or set PAGE_PASSWORD",
    ),
    **TRAINING_TEXTS,
}


def translate(language: str, key: str, **values: object) -> str:
    """The text `key` in one of LANGUAGES, with its placeholders filled in."""
    return TEXTS[key][list(LANGUAGES).index(language)].format(**values)


def negotiate_language(preferences: str | None) -> str:
    """The language for a browser with these `preferences` (an Accept-Language header or one locale)."""
    weighted = []
    for position, part in enumerate((preferences or "").lower().split(",")):
        tag, _, weight = part.strip().partition(";q=")
        language = tag.split("-")[0]
        if language in LANGUAGES:
            weighted.append((-_parse_weight(weight), position, language))
    return min(weighted)[2] if weighted else "en"


def _parse_weight(weight: str) -> float:
    try:
        return float(weight or 1)
    except ValueError:
        return 0.0
