// What openai-node makes of one stream: a line of JSON with the fields of test_endings.py's `Heard`.
// Arguments: the API's base URL, the key, the model, the prompt, chat or responses, how many retries.
import OpenAI from 'openai';

const [baseURL, apiKey, model, prompt, api, maxRetries] = process.argv.slice(2);
const sdk = new OpenAI({ baseURL, apiKey, maxRetries: Number(maxRetries), timeout: 30_000 });
const heard = { text: '' };

async function chat() {
  const messages = [{ role: 'user', content: prompt }];
  const stream = await sdk.chat.completions.create({ model, messages, stream: true });
  for await (const chunk of stream) heard.text += chunk.choices[0].delta.content ?? '';
}

async function responses() {
  const stream = await sdk.responses.create({ model, input: prompt, stream: true });
  for await (const event of stream) {
    if (event.type === 'response.output_text.delta') heard.text += event.delta;
  }
}

try {
  await { chat, responses }[api]();
} catch (thrown) {
  const { message, status = null, error = null } = thrown;
  Object.assign(heard, { raised: thrown.constructor.name, message, status, error });
}
console.log(JSON.stringify(heard));
