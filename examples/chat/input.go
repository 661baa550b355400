package main

import (
	"bytes"
	"strings"
	"unicode"
)

// maxLine is the longest line a member may type, in bytes.
const maxLine = 512

// A typist turns bytes into lines. What it holds between two calls is the
// half-typed line, and that is what travels; of a line that is too long it
// keeps just enough to know.
type typist struct{ half []byte }

// next takes bytes up to the end of a line. done says that it got there: line
// is without its end, and rest follows it. tooLong lines are dropped.
func (t *typist) next(p []byte) (line string, rest []byte, done, tooLong bool) {
	end := bytes.IndexByte(p, '\n')
	part := p
	if end >= 0 {
		part, rest = p[:end], p[end+1:]
	}
	// One byte more than allowed shows that the line is too long; \r may be it.
	t.half = append(t.half, part[:min(len(part), max(0, maxLine+2-len(t.half)))]...)
	if end < 0 {
		return "", nil, false, false
	}
	typed := bytes.TrimSuffix(t.half, []byte("\r"))
	tooLong = len(typed) > maxLine
	if !tooLong {
		line = printable(string(typed))
	}
	t.half = t.half[:0]
	return line, rest, true, tooLong
}

// printable leaves out what could drive the terminals of the others.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, s)
}

// A command is a line that begins with a slash, or something said, which has
// the name "".
type command struct{ name, arg string }

func parse(line string) command {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "/") {
		return command{arg: line}
	}
	name, arg, _ := strings.Cut(line[1:], " ")
	if name == "" {
		name = "/"
	}
	return command{name: strings.ToLower(name), arg: strings.TrimSpace(arg)}
}

// validName accepts nicks and room names: letters, digits, - and _.
func validName(s string) bool {
	if s == "" || len(s) > 24 {
		return false
	}
	for _, r := range s {
		if r != '-' && r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r) {
			return false
		}
	}
	return true
}
