"""What the pages say, in Chinese and in English."""

LANGUAGES = {"zh": "中文", "en": "English"}
TEXTS = {
    "title": ("ChatGLM3", "ChatGLM3"),
    "language": ("界面语言", "Language"),
    "settings": ("设置", "Settings"),
    "model": ("模型或适配器", "Model or adapter"),
    "adapter_of": ("{name}（{parent} 的适配器）", "{name} (adapter of {parent})"),
    "refresh": ("刷新模型列表", "Refresh the models"),
    "system": ("系统提示词", "System prompt"),
    "system_hint": ("可留空；会放在对话最前面", "May be empty; stands in front of the conversation"),
    "max_tokens": ("最长回答（token）", "Longest answer"),
    "temperature": ("温度", "Temperature"),
    "top_p": ("top_p", "top_p"),
    "tool_mode": ("工具模式", "Tool mode"),
    "tools": ("工具定义（JSON 数组）", "Tools (a JSON array)"),
    "key": ("API 密钥（只在本页使用）", "API key (for this page only)"),
    "question": ("输入问题，回车发送", "Ask; Enter sends"),
    "observation": ("输入 {name} 的返回结果，回车发送", "Type what {name} returns; Enter sends"),
    "send": ("发送", "Send"),
    "stop": ("停止", "Stop"),
    "regenerate": ("重新生成", "Regenerate"),
    "edit": ("修改上一问", "Edit last question"),
    "clear": ("清空对话", "Clear"),
    "export": ("导出训练数据", "Export for training"),
    "copy": ("复制", "Copy"),
    "empty": ("你好！有什么可以帮你？", "Hello! How can I help?"),
    "call": ("调用工具 **{name}**", "Calls the tool **{name}**"),
    "result": ("工具返回", "The tool returned"),
    "waiting": ("等待模型…", "Waiting for the model…"),
    "stats": (
        "回答 {answer} 个 token，提示 {prompt} 个；{seconds} 秒，每秒 {rate} 个 token",
        "{answer} tokens of answer, {prompt} of prompt; {seconds} s, {rate} tokens/s",
    ),
    "stats_stopped": (
        "已停止：约 {answer} 个 token，{seconds} 秒，每秒 {rate} 个 token",
        "Stopped: about {answer} tokens in {seconds} s, {rate} tokens/s",
    ),
    "cut": ("回答达到长度上限，已截断", "The answer was cut at its limit"),
    "dropped": ("上下文已满，省略了最早的 {count} 轮", "The window is full: oldest rounds left out: {count}"),
    "down": (
        "连不上模型服务：{detail}。恢复后可点“重新生成”。",
        "The API is down: {detail}. Regenerate once it is back.",
    ),
    "busy": ("模型服务繁忙，请 {seconds} 秒后重试", "The API is busy; try again in {seconds} seconds"),
    "needs_key": (
        "模型服务需要有效的 API 密钥，请在设置中填写",
        "The API needs a valid key; enter one in the settings",
    ),
    "loading": ("模型正在加载，请 {seconds} 秒后重试", "The model is loading; try again in {seconds} seconds"),
    "too_long": ("这个问题放不进模型的上下文：{detail}", "This question does not fit the model's window: {detail}"),
    "refused": ("模型服务拒绝了请求：{detail}", "The API refused the request: {detail}"),
    "failed": ("模型服务出错：{detail}", "The API failed: {detail}"),
    "bad_tools": ("工具定义有误：{detail}", "The tools are not understood: {detail}"),
    "nothing_to_export": ("还没有可导出的问答（工具轮次不导出）", "Nothing to export yet (tool rounds are left out)"),
    "run_title": ("训练进度", "Training run"),
    "run_missing": (
        "{folder} 里还没有训练记录，本页会自动刷新",
        "{folder} holds no training record yet; this page refreshes itself",
    ),
    "progress": ("第 {step} / {steps} 步", "Step {step} of {steps}"),
    "elapsed": ("已用时间", "Time so far"),
    "left": ("剩余时间", "Time left"),
    "finished": ("已完成", "finished"),
    "unknown": ("未知", "unknown"),
    "epoch": ("轮次", "Epoch"),
    "loss": ("训练损失", "Training loss"),
    "eval_loss": ("验证损失", "Validation loss"),
    "learning_rate": ("学习率", "Learning rate"),
    "gradient": ("梯度范数", "Gradient norm"),
    "step": ("步", "step"),
    "scores": ("评测分数", "Scores"),
    "samples": ("预测样例", "Sample predictions"),
    "prompt": ("输入", "prompt"),
    "reference": ("参考", "reference"),
    "prediction": ("预测", "prediction"),
    "no_scores": ("还没有评测结果", "No scores yet"),
    "folder": ("输出目录", "Output folder"),
    "checkpoints": ("检查点", "Checkpoints"),
    "updated": ("更新于 {time}", "as of {time}"),
}


def say(language: str, key: str, **values: object) -> str:
    """The text `key` in a language of LANGUAGES, its {names} filled in."""
    return TEXTS[key][list(LANGUAGES).index(language)].format(**values)


def language_of(preferences: str | None) -> str:
    """The language for a browser that prefers `preferences` (an Accept-Language header or one locale)."""
    weighted = []
    for position, part in enumerate((preferences or "").lower().split(",")):
        tag, _, weight = part.strip().partition(";q=")
        language = tag.split("-")[0]
        if language in LANGUAGES:
            weighted.append((-_number(weight), position, language))
    return min(weighted)[2] if weighted else "en"


def _number(weight: str) -> float:
    try:
        return float(weight or 1)
    except ValueError:
        return 0.0
