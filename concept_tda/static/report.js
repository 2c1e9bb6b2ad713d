mountEmbedded(document.getElementById("browser"), JSON.parse(document.getElementById("data").textContent));
document.querySelectorAll(".ends[open]").forEach(ends => { ends.open = false; });   // they are in the browser now
addEventListener("beforeprint", () => document.querySelectorAll(".ends").forEach(ends => { ends.open = true; }));
