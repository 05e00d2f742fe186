"""A chat server that prefills nothing twice, not even after a restart: python examples/chat_server.py MODEL [FOLDER]

    curl -d '{"messages": [{"role": "user", "content": "Hello"}]}' http://127.0.0.1:8000

Clients send the whole conversation, as chat clients do. The prefix cache finds what it has of it; nothing is named.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_cachegen

PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def serve(model_name: str, folder: str, port: int = 8000, **options: int) -> ThreadingHTTPServer:
    """Return a server of this model, whose prefix cache lives in `folder`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)
    prefix_cache = hf_cachegen.PrefixCache(folder, max_bytes="20GB", **options)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN
    hf_cachegen.attach(model, prefix_cache=prefix_cache)
    one_at_a_time = threading.Lock()

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer a conversation."""
            messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            with one_at_a_time:
                output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
            answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            stats = prefix_cache.stats()
            body = {"content": answer, "reused": stats.tokens_reused, "computed": stats.tokens_computed}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    return ThreadingHTTPServer(("127.0.0.1", port), Chat)


if __name__ == "__main__":
    serve(sys.argv[1], *sys.argv[2:3] or ["~/.cache/hf_cachegen/prefixes"]).serve_forever()
