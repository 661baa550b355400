package config

import (
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// keyLines returns the line on which each key of a TOML document is written. The
// document is one that toml.Unmarshal accepted. The decoder itself tells positions
// only for the first mistake it meets, and none for a mistake in meaning.
func keyLines(data []byte) map[string]int {
	ix := &indexer{lines: make(map[string]int), arrays: make(map[string]int)}
	for i, c := range data {
		if c == '\n' {
			ix.newlines = append(ix.newlines, i)
		}
	}
	ix.parser.Reset(data)
	table := ""
	for ix.parser.NextExpression() {
		switch e := ix.parser.Expression(); e.Kind {
		case unstable.Table:
			table = ix.key("", e.Key(), false)
		case unstable.ArrayTable:
			table = ix.key("", e.Key(), true)
		case unstable.KeyValue:
			ix.keyValue(table, e)
		}
	}
	return ix.lines
}

type indexer struct {
	parser   unstable.Parser
	newlines []int
	lines    map[string]int
	arrays   map[string]int // elements so far of each array of tables
}

func (ix *indexer) line(r unstable.Range) int {
	return 1 + sort.SearchInts(ix.newlines, int(r.Offset))
}

// key records a dotted key below a table and returns its full name. With array, the
// key opens a new element of an array of tables.
func (ix *indexer) key(table string, parts unstable.Iterator, array bool) string {
	name := table
	for parts.Next() {
		n := parts.Node()
		name = join(name, string(n.Data))
		last := parts.IsLast()
		if array && last {
			ix.arrays[name]++
		}
		line := ix.line(n.Raw)
		if _, ok := ix.lines[name]; !ok {
			ix.lines[name] = line
		}
		if n := ix.arrays[name]; n > 0 {
			name = fmt.Sprintf("%s[%d]", name, n-1)
			if array && last {
				ix.lines[name] = line
			}
		}
	}
	return name
}

func (ix *indexer) keyValue(table string, kv *unstable.Node) {
	ix.value(ix.key(table, kv.Key(), false), kv.Value())
}

// value records the keys inside of an array or an inline table.
func (ix *indexer) value(name string, v *unstable.Node) {
	switch v.Kind {
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			if kv := it.Node(); kv.Kind == unstable.KeyValue {
				ix.keyValue(name, kv)
			}
		}
	case unstable.Array:
		i := 0
		for it := v.Children(); it.Next(); {
			el := it.Node()
			if el.Kind == unstable.Comment {
				continue
			}
			elem := fmt.Sprintf("%s[%d]", name, i)
			if el.Raw.Length > 0 {
				ix.lines[elem] = ix.line(el.Raw)
			}
			ix.value(elem, el)
			i++
		}
	}
}

// join appends one part to a dotted key, in quotes where TOML would need them.
func join(table, part string) string {
	const bareChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
	if part == "" || strings.Trim(part, bareChars) != "" {
		part = strconv.Quote(part)
	}
	if table == "" {
		return part
	}
	return table + "." + part
}
