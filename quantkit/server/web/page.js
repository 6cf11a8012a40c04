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
  const asked = new Set(), answered = {};
  let said = "", before = {}, nGroups = 0;

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

  const shownId = () => new URL(location).searchParams.get("job");
  window.qkNotify = async () => {
    const id = shownId();
    if (!id) return;
    let text = "This browser has no notifications.";
    if ("Notification" in window) {
      const allows = await Notification.requestPermission() === "granted";
      if (allows) asked.add(id);
      text = allows ? "You will be told when this run ends, as long as this tab is open."
        : "The browser does not allow notifications from this page.";
    }
    say(answered[id] = text);
    look();
  };

  // Where the focus belongs until somebody moves it: what an action hides, and what is drawn anew,
  // loses it.
  let home = "";
  const goHome = () => {
    const to = home && document.activeElement === document.body && document.querySelector(home);
    if (!to) return;
    if (to.tabIndex < 0) to.tabIndex = -1;
    to.focus({ preventScroll: true });
  };
  window.qkFocus = (selector) => {
    document.activeElement.blur();
    home = selector;
    goHome();
  };
  setInterval(goHome, 200);
  addEventListener("focusin", (event) => { if (home && !event.target.matches(home)) home = ""; });
  addEventListener("pointerdown", () => { home = ""; });
  addEventListener("keydown", (event) => {
    const keep = document.querySelector("#keep");
    if (event.key === "Escape" && keep && keep.checkVisibility()) keep.click();
  });

  // Gradio answers a key after the focus has moved on, and would open the list again.
  addEventListener("keydown", (event) => {
    if (["Tab", "Shift"].includes(event.key) && event.target.role === "combobox") event.stopPropagation();
  }, true);

  addEventListener("click", async (event) => {
    const button = event.target.closest && event.target.closest("[data-qk-copy]");
    if (!button) return;
    const text = document.getElementById(button.dataset.qkCopy);
    if (!text) return;
    await copy(text.textContent);
    const word = button.textContent;
    button.textContent = "Copied";
    say("Copied.");
    setTimeout(() => {
      button.textContent = word;
      if (document.activeElement === document.body) button.focus();
    }, 1500);
  });

  // A text of one's own is sent by itself; the form has what the server calls it.
  const base64 = (file) => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(String(reader.result).replace(/^[^,]*,/, ""));
    reader.onerror = failed;
    reader.readAsDataURL(file);
  });
  const send = async (file) => {
    if (!file) return ["", ""];
    if (file.size > 4e6) return ["", "The file is larger than 4 MB."];
    const answer = await fetch(new URL("texts", document.baseURI), {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ text: await base64(file) }),
    });
    if (!answer.ok) return ["", await answer.text()];
    const { id, n_characters: n } = await answer.json();
    return [id, `${n.toLocaleString()} characters are used to calibrate.`];
  };
  addEventListener("change", async (event) => {
    if (event.target.id !== "own-text") return;
    const told = document.getElementById("own-text-said");
    told.textContent = "Sending …";
    const [id, text] = await send(event.target.files[0]).catch(() => ["", "It could not be sent."]);
    const field = document.querySelector("#own-text-id textarea, #own-text-id input");
    field.value = id;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    told.textContent = text;
  });

  // Gradio names each radio otherwise, again with every change: with one name they are a group, one
  // stop of Tab, moved in by arrows. A name is never that of another group, which would take its
  // choice away.
  const nameRadios = () => {
    for (const group of document.querySelectorAll("fieldset")) {
      group.dataset.qkGroup ||= `qk-group-${nGroups++}`;
      for (const radio of group.querySelectorAll("input[type=radio]")) {
        if (radio.name !== group.dataset.qkGroup) radio.name = group.dataset.qkGroup;
      }
    }
  };
  addEventListener("keydown", nameRadios, true);

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
    const notify = document.querySelector("#notify");
    if (notify) {
      notify.dataset.qkWord ||= notify.textContent;
      const word = answered[shownId()] || notify.dataset.qkWord;
      if (notify.textContent !== word) notify.textContent = word;
    }
    nameRadios();
    for (const link of document.querySelectorAll("[data-qk-url]")) {
      const whole = new URL(link.dataset.qkUrl, document.baseURI).href;
      if (link.textContent !== whole) link.textContent = whole;
    }
    for (const time of document.querySelectorAll("#job time[datetime]:not([data-qk-local])")) {
      time.dataset.qkLocal = "";
      time.textContent = new Date(time.dateTime).toLocaleTimeString();
      time.title = time.dateTime;
    }
  };
  setInterval(look, 1000);
})();
