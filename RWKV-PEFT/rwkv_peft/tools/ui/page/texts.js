// All texts of the page, by language and key. {0}, {1} … stand for values. What commands print stays as they print it.
export const TEXTS = {
  en: {
    // main.js, index.html
    "to the content": "to the content",
    "nav.label": "pages",
    "nav.data": "Data",
    "nav.train": "Train",
    "nav.runs": "Runs",
    "nav.chat": "Chat",
    "nav.release": "Release",
    language: "Language",

    // runs.js, chart.js

    // chat.js
  },
  zh: {
    // main.js, index.html
    "to the content": "跳到内容",
    "nav.label": "页面",
    "nav.data": "数据",
    "nav.train": "训练",
    "nav.runs": "过程",
    "nav.chat": "聊天",
    "nav.release": "发布",
    language: "语言",

    // runs.js, chart.js

    // chat.js
  },
};
export const LANGUAGES = { en: "English", zh: "中文" };
const KEPT = "rwkv-peft language";

// The language that was chosen here before, else the first of the browser's that the page has.
export const language = [localStorage.getItem(KEPT), ...navigator.languages.map((one) => one.split("-")[0])].find((one) => one in TEXTS) ?? "en";

// The text of a key, with values in its places.
export function t(key, ...values) {
  const text = TEXTS[language][key];
  if (text === undefined) throw new Error(`texts.js: ${key}`);
  return text.replace(/\{(\d)\}/g, (_, n) => values[n]);
}

export function speak(other) {
  localStorage.setItem(KEPT, other);
  location.reload();
}
