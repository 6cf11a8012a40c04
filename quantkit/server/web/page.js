// What the page does by itself, beside Gradio: no other script is loaded.

// Start and Delete change the address in place; the way back loads what it names.
addEventListener("popstate", () => location.reload());

// Each request of the page carries the token that only the page can ask for (see gate.py); after a
// new cookie it asks once more.
(() => {
  const plain = window.fetch.bind(window);
  const ask = () => plain(new URL("session", document.baseURI)).then(a => a.ok ? a.text() : "");
  let token = ask();
  window.fetch = async (what, how) => {
    const asked = new Request(what, how);
    if (new URL(asked.url).origin !== location.origin) return plain(asked);
    const send = async () => {
      const one = asked.clone();
      one.headers.set("x-quantkit-page", await token);
      return plain(one);
    };
    const answer = await send();
    if (answer.status !== 403) return answer;
    token = ask();
    return send();
  };
})();

(() => {
  // What was asked for stays as it was: a run's id, and whether its end is to be told.
  const asked = new Set();
  let said = "", before = {};

  // Heard by screen readers; what Gradio replaces is not.
  const live = document.createElement("div");
  live.className = "qk-sr";
  live.setAttribute("role", "status");
  const say = (text) => { if (text && text !== said) { live.textContent = said = text; } };

  const copy = async (text) => {
    if (navigator.clipboard && isSecureContext) return navigator.clipboard.writeText(text);
    const field = document.createElement("textarea");  // without https there is no clipboard
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  };

  window.qkNotify = async () => {
    const id = new URL(location).searchParams.get("job");
    if (!id) return;
    if (!("Notification" in window)) return say("This browser has no notifications.");
    if (await Notification.requestPermission() === "granted") {
      asked.add(id);
      say("You will be told when this run ends, as long as this tab is open.");
    } else {
      say("The browser does not allow notifications from this page.");
    }
  };

  addEventListener("click", async (event) => {
    const button = event.target.closest && event.target.closest("[data-qk-copy]");
    if (!button) return;
    const text = document.getElementById(button.dataset.qkCopy);
    if (!text) return;
    await copy(text.textContent);
    const word = button.textContent;
    button.textContent = "Copied";
    say("Copied.");
    setTimeout(() => { button.textContent = word; button.focus(); }, 1500);
  });

  const look = () => {
    if (!live.isConnected && document.body) document.body.append(live);
    const at = document.querySelector("#job-stages [data-qk-title]");
    const head = document.querySelector("#job-head [data-qk-title]");
    const shown = at || head;
    document.title = shown ? `${shown.dataset.qkTitle} · quantkit` : "quantkit";
    if (shown) say(shown.dataset.qkSay);
    if (head) {
      const { qkId: id, qkState: state } = head.dataset;
      const was = before[id];
      before = { [id]: state };
      if (was && was !== state && asked.has(id) && !["running", "queued"].includes(state)) {
        asked.delete(id);
        new Notification(head.dataset.qkSay, { tag: id });
      }
    }
    for (const time of document.querySelectorAll("#job time[datetime]:not([data-qk-local])")) {
      time.dataset.qkLocal = "";
      time.textContent = new Date(time.dateTime).toLocaleTimeString();
      time.title = time.dateTime;
    }
  };
  setInterval(look, 1000);
})();
