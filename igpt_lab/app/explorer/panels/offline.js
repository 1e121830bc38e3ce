// A model without a kernel, for the page that an explorer is saved as: what was sent, and who listens to it.

function offlineModel(sent, arrays) {
  const values = { ...sent };
  const listeners = {};
  for (const [name, text] of Object.entries(arrays))
    values[name] = new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
  return {
    offline: true,
    get: (name) => values[name],
    set: (name, value) => {
      values[name] = value;
      for (const listener of listeners[`change:${name}`] || []) listener();
    },
    on: (event, listener) => { listeners[event] = [...(listeners[event] || []), listener]; },
    off: () => {},
    save_changes: () => {},
    send: () => {},
  };
}
