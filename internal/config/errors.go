package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Error is one problem of a configuration.
type Error struct {
	File    string // empty for flags
	Line    int    // 0 when it is not known
	Key     string // "listener[1].address", or "--listen"; empty for the file as a whole
	Problem string
	Remedy  string
}

// Error returns "file:line: key: problem; remedy".
func (e *Error) Error() string {
	var b strings.Builder
	switch {
	case e.File != "" && e.Line > 0:
		fmt.Fprintf(&b, "%s:%d: ", e.File, e.Line)
	case e.File != "":
		fmt.Fprintf(&b, "%s: ", e.File)
	}
	if e.Key != "" {
		fmt.Fprintf(&b, "%s: ", e.Key)
	}
	b.WriteString(e.Problem)
	if e.Remedy != "" {
		b.WriteString("; " + e.Remedy)
	}
	return b.String()
}

// Errors is every problem of a configuration, in the order of its lines: never empty
// where one is returned.
type Errors []*Error

// Error returns one line for each problem.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, p := range e {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives errors.As each problem.
func (e Errors) Unwrap() []error {
	out := make([]error, len(e))
	for i, p := range e {
		out[i] = p
	}
	return out
}

// source knows where the keys of a Config were written.
type source struct {
	file  string
	lines map[string]int    // by key, as "listener[1].address"
	flags map[string]string // key to flag; nil for a file
}

// line returns the line of a key, or of the nearest table around it for a key that
// was left out.
func (s *source) line(key string) int {
	for s != nil && key != "" {
		if n, ok := s.lines[key]; ok {
			return n
		}
		switch i := strings.LastIndexAny(key, ".["); {
		case i < 0:
			key = ""
		default:
			key = key[:i]
		}
	}
	return 0
}

// written reports whether the operator wrote that key.
func (s *source) written(key string) bool {
	if s == nil {
		return false
	}
	_, ok := s.lines[key]
	return ok
}

// isFlags reports whether remedies have to speak of flags.
func (s *source) isFlags() bool { return s != nil && s.flags != nil }

// name returns what the operator calls a key.
func (s *source) name(key string) string {
	if s.isFlags() {
		if f, ok := s.flags[key]; ok {
			return f
		}
	}
	return key
}

// place names a key in the middle of a sentence: "listener[0] on line 5".
func (s *source) place(key string) string {
	if n := s.line(key); n > 0 {
		return fmt.Sprintf("%s on line %d", key, n)
	}
	return s.name(key)
}

// problems collects.
type problems struct {
	src  *source
	errs Errors
}

func (p *problems) add(key, remedy, format string, args ...any) {
	e := &Error{Line: p.src.line(key), Key: p.src.name(key), Problem: fmt.Sprintf(format, args...), Remedy: remedy}
	if p.src != nil {
		e.File = p.src.file
	}
	p.errs = append(p.errs, e)
}

// err returns everything that was collected, or nil.
func (p *problems) err() error {
	if len(p.errs) == 0 {
		return nil
	}
	slices.SortStableFunc(p.errs, func(a, b *Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Key, b.Key))
	})
	return p.errs
}
