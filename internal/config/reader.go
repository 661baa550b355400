package config

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// reader brings a decoded TOML tree into a Config, and goes on after a mistake.
type reader struct {
	problems
	meant map[string]bool // keys that an unknown key was most likely meant to be
}

// reported reports whether there is a message already that explains a problem of key:
// about the key itself, a table around it, or a misspelling of it.
func (r *reader) reported(key string) bool {
	return r.meant[key] || slices.ContainsFunc(r.errs, func(e *Error) bool {
		rest, ok := strings.CutPrefix(key, e.Key)
		return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// field reads the value of one key.
type field func(key string, v any)

func (r *reader) config(c *Config, tree map[string]any) {
	r.table("", tree, map[string]field{
		"admin":             r.text(&c.Admin),
		"handshake_timeout": r.duration(&c.HandshakeTimeout),
		"max_sessions":      r.number(&c.MaxSessions),
		"self_signed":       r.boolean(&c.SelfSigned),
		"tls": func(key string, v any) {
			r.table(key, v, map[string]field{
				"cert":        r.text(&c.TLS.Cert),
				"key":         r.text(&c.TLS.Key),
				"min_version": r.text(&c.TLS.MinVersion),
			})
		},
		"listener": func(key string, v any) {
			c.Listeners = make([]Listener, r.tables(key, v))
			for i := range c.Listeners {
				l := &c.Listeners[i]
				r.element(key, v, i, map[string]field{
					"address":     r.text(&l.Address),
					"pool":        r.text(&l.Pool),
					"cert":        r.text(&l.Cert),
					"key":         r.text(&l.Key),
					"alpn":        r.texts(&l.ALPN),
					"min_version": r.text(&l.MinVersion),
					"client_ca":   r.text(&l.ClientCA),
				})
			}
		},
		"pool": func(key string, v any) {
			c.Pools = make([]Pool, r.tables(key, v))
			for i := range c.Pools {
				c.Pools[i] = NewPool()
				p := &c.Pools[i]
				r.element(key, v, i, map[string]field{
					"name":           r.text(&p.Name),
					"command":        r.texts(&p.Command),
					"workers":        r.number(&p.Workers),
					"dispatch":       r.text(&p.Dispatch),
					"offload":        r.text(&p.Offload),
					"rekey":          r.text(&p.Rekey),
					"ready_timeout":  r.duration(&p.ReadyTimeout),
					"freeze_timeout": r.duration(&p.FreezeTimeout),
					"move_rate":      r.number(&p.MoveRate),
					"stop_timeout":   r.duration(&p.StopTimeout),
					"heartbeat":      r.duration(&p.Heartbeat),
					"hang_timeout":   r.duration(&p.HangTimeout),
					"probation":      r.duration(&p.Probation),
					"poison":         r.number(&p.Poison),
					"poison_reset":   r.duration(&p.PoisonReset),
					"crash_exact":    r.boolean(&p.CrashExact),
					"crash_memory":   r.number(&p.CrashMemory),
					"retain":         r.boolean(&p.Retain),
					"nofile":         r.limit(&p.NoFile),
					"env":            r.textMap(&p.Env),
					"dir":            r.text(&p.Dir),
				})
			}
		},
	})
}

// table reads the keys of a table and reports those that nobody knows.
func (r *reader) table(key string, v any, fields map[string]field) {
	t, ok := v.(map[string]any)
	if !ok {
		r.wrongType(key, v, "a table", fmt.Sprintf("write [%s] on a line of its own and its keys below", key))
		return
	}
	for _, k := range slices.Sorted(maps.Keys(t)) {
		full := join(key, k)
		if f, ok := fields[k]; ok {
			f(full, t[k])
			continue
		}
		known := slices.Sorted(maps.Keys(fields))
		remedy := "the keys here are " + strings.Join(known, ", ")
		if near := nearest(k, known); near != "" {
			remedy = fmt.Sprintf("did you mean %q?", near)
			r.meant[join(key, near)] = true
		}
		r.add(full, remedy, "unknown key")
	}
}

// tables returns the number of elements of an array of tables.
func (r *reader) tables(key string, v any) int {
	if a, ok := v.([]any); ok {
		return len(a)
	}
	r.wrongType(key, v, "a list of tables", fmt.Sprintf("write [[%s]], in double brackets", key))
	return 0
}

func (r *reader) element(key string, v any, i int, fields map[string]field) {
	elem := fmt.Sprintf("%s[%d]", key, i)
	if t, ok := v.([]any)[i].(map[string]any); ok {
		r.table(elem, t, fields)
		return
	}
	r.wrongType(elem, v.([]any)[i], "a table", fmt.Sprintf("write [[%s]] and its keys below", key))
}

func (r *reader) text(dst *string) field { return typed(r, dst, "text", "write it in quotes") }

func (r *reader) boolean(dst *bool) field {
	return typed(r, dst, "true or false", "write true or false, without quotes")
}

// typed takes a value that TOML has a type for.
func typed[T any](r *reader, dst *T, what, how string) field {
	return func(key string, v any) {
		x, ok := v.(T)
		if !ok {
			r.wrongType(key, v, what, how)
			return
		}
		*dst = x
	}
}

func (r *reader) number(dst *int) field {
	return func(key string, v any) {
		n, ok := v.(int64)
		if !ok {
			r.wrongType(key, v, "a whole number", "write a number without quotes")
			return
		}
		if n < math.MinInt32 || n > math.MaxInt32 {
			r.add(key, "give a number that makes sense here", "%d is out of range", n)
			return
		}
		*dst = int(n)
	}
}

func (r *reader) limit(dst *uint64) field {
	return func(key string, v any) {
		n, ok := v.(int64)
		if !ok {
			r.wrongType(key, v, "a whole number", "write a number without quotes")
			return
		}
		if n < 0 {
			r.add(key, "leave it out to keep the supervisor's limit", "%d is negative", n)
			return
		}
		*dst = uint64(n)
	}
}

func (r *reader) duration(dst *Duration) field {
	return func(key string, v any) {
		const remedy = `write a number and a unit in quotes, as "10s", "500ms" or "1m30s"`
		s, ok := v.(string)
		if !ok {
			r.wrongType(key, v, "a duration", remedy)
			return
		}
		d, err := time.ParseDuration(s)
		if err != nil {
			r.add(key, remedy, "%q is no duration", s)
			return
		}
		*dst = Duration(d)
	}
}

func (r *reader) texts(dst *[]string) field {
	return func(key string, v any) {
		const remedy = `write ["…", "…"]`
		a, ok := v.([]any)
		if !ok {
			r.wrongType(key, v, "a list of texts", remedy)
			return
		}
		list := make([]string, 0, len(a))
		for i, el := range a {
			s, ok := el.(string)
			if !ok {
				r.wrongType(fmt.Sprintf("%s[%d]", key, i), el, "text", "write it in quotes")
				continue
			}
			list = append(list, s)
		}
		*dst = list
	}
}

func (r *reader) textMap(dst *map[string]string) field {
	return func(key string, v any) {
		t, ok := v.(map[string]any)
		if !ok {
			r.wrongType(key, v, "a table of texts", `write { NAME = "value" }`)
			return
		}
		m := make(map[string]string, len(t))
		for _, k := range slices.Sorted(maps.Keys(t)) {
			s, ok := t[k].(string)
			if !ok {
				r.wrongType(join(key, k), t[k], "text", "write it in quotes")
				continue
			}
			m[k] = s
		}
		*dst = m
	}
}

func (r *reader) wrongType(key string, v any, want, remedy string) {
	var is string
	switch v := v.(type) {
	case string:
		is = "text"
	case int64:
		is = "a number"
	case float64:
		is = "a number with a fraction"
	case bool:
		is = fmt.Sprint(v)
	case []any:
		is = "a list"
	case map[string]any:
		is = "a table"
	default:
		is = "a date or time"
	}
	r.add(key, remedy, "must be %s, not %s", want, is)
}

// nearest returns the known word that was most likely meant, or "".
func nearest(word string, known []string) string {
	best, least := "", 3 // at most two letters wrong
	for _, k := range known {
		if d := distance(word, k); d < least && d < len(k) {
			best, least = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance, in bytes, case and '-' for '_' being free.
func distance(a, b string) int {
	a = strings.ReplaceAll(strings.ToLower(a), "-", "_")
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diag, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diag+cost)
		}
	}
	return row[len(b)]
}
